#!/usr/bin/env bash
# Called by launch/tpu_vm.sh on each worker. gcloud repeats a command when its connection breaks, so each
# of these may be called twice, also while the first call is still running.
# usage: launch/tpu_worker.sh setup BUCKET RECORDS   installs, mounts the bucket as runs/, copies records
#        launch/tpu_worker.sh idle                   fails while histo_jax.main runs
#        launch/tpu_worker.sh start ID OPTION ...    starts histo_jax.main in the background, unless it runs
#        launch/tpu_worker.sh state                  prints `running`, or the exit status of the last run
#        launch/tpu_worker.sh log LINES              prints the log after this line, and its number of lines
#        launch/tpu_worker.sh stop                   makes the run save and exit
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
action=${1:-}
case $action in
  setup | idle | start | state | log | stop) shift; mkdir -p .run ;;
  --help | -h) sed -n '2,9s/^# //p' launch/tpu_worker.sh; exit ;;
  *) echo "launch/tpu_worker.sh: unknown command $action (see --help)" >&2; exit 2 ;;
esac

install() { # packages of apt
  # On a new VM the daily update holds the locks of apt, whose timeout does not apply to `update`.
  for _ in {1..30}; do
    sudo apt-get update -q && break
    sleep "${HISTO_JAX_POLL_SECONDS:-10}"
  done
  sudo apt-get -o DPkg::Lock::Timeout=600 install -qy "$@"
}

mount_runs() { # bucket
  local mounted key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
  mounted=$(findmnt --noheadings --output=SOURCE --mountpoint="$PWD/runs" || true)
  if [ "$mounted" = "$1" ]; then return; fi
  if [ "$mounted" ]; then
    echo "launch/tpu_vm.sh: $mounted is mounted as ~/histo_jax/runs, not $1: name it, or unmount it on each worker (fusermount -u)" >&2
    exit 2
  fi
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL "$apt/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    install gcsfuse
  fi
  mkdir -p runs
  # Checkpoints are committed by renaming a folder; gcsfuse limits the number of files in it. Its
  # process keeps running and must not inherit the lock of `setup`.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$1" runs 9>&-
}

case $action in
  setup)
    exec 9>.run/setup.lock
    flock 9
    # The common runtimes are Ubuntu 22.04 with Python 3.10.
    if ! command -v python3.13 python3.12 python3.11 >/dev/null; then install python3.11-venv; fi
    launch/install.sh tpu
    if [ "$1" ]; then mount_runs "$1"; fi
    if [ "$2" ]; then
      mkdir -p ~/tensorflow_datasets/histopathology
      gcloud storage rsync --recursive "${2%/}/histopathology" ~/tensorflow_datasets/histopathology
    fi
    ;;
  idle)
    exec 9>.run/lock
    flock -n 9
    ;;
  start)
    # The run and its shell hold the lock while they run.
    exec 9>.run/lock
    if ! flock -w 1 9 || [ "$(cat .run/id 2>/dev/null)" = "$1" ]; then exit; fi
    rm -rf .run/status .run/pid .run/stopped
    echo "$1" >.run/id
    shift
    # shellcheck disable=SC2016  # expanded by the inner shell
    PYTHONUNBUFFERED=1 setsid bash -c '"$@" & echo $! >.run/pid; s=0; wait $! || s=$?; echo $s >.run/status' \
      run .venv/bin/python -m histo_jax.main --multihost=tpu "$@" </dev/null >.run/log 2>&1 &
    # Waits until it has left the session of the connection; on a full disk there is no pid file.
    until [ -s .run/pid ] || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
    ;;
  state)
    exec 9>.run/lock
    if ! flock -n 9; then
      echo "histo_jax: running"
    else # 137: its shell was killed, too
      echo "histo_jax: $(cat .run/status 2>/dev/null || echo 137)"
    fi
    ;;
  log)
    lines=$(wc -l <.run/log)
    awk -v after="$1" -v last="$lines" 'NR > after && NR <= last' .run/log
    echo "$lines"
    ;;
  stop)
    exec 9>.run/lock
    # Only once, because at the second signal it exits without a save.
    if ! flock -n 9; then
      pid=$(cat .run/pid)
      if mkdir .run/stopped 2>/dev/null; then kill -TERM "$pid"; fi
    fi
    ;;
esac
