#!/usr/bin/env bash
# What launch/tpu_vm.sh calls on every worker. gcloud repeats a command when its connection breaks, so
# that each of these may come twice, also while the first still works.
# usage: launch/tpu_worker.sh setup BUCKET RECORDS   installs; mounts the bucket as runs/, copies records
#        launch/tpu_worker.sh idle                   fails while histo_jax.main runs
#        launch/tpu_worker.sh start ID OPTION ...    histo_jax.main in the background, unless it runs
#        launch/tpu_worker.sh state                  running, or the status that it has ended with
#        launch/tpu_worker.sh log LINES              what it has said after so many lines, and how many
#        launch/tpu_worker.sh stop                   lets it save and leave
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
verb=${1:-}
case $verb in
  setup | idle | start | state | log | stop) shift; mkdir -p .run ;;
  --help | -h) sed -n '2,9s/^# //p' launch/tpu_worker.sh; exit ;;
  *) echo "launch/tpu_worker.sh: unknown command $verb (see --help)" >&2; exit 2 ;;
esac

install() { # packages of apt
  # On a new VM the daily update holds apt's locks; its timeout is not for that of `update`.
  for _ in {1..30}; do
    sudo apt-get update -q && break
    sleep "${HISTO_JAX_POLL_SECONDS:-10}"
  done
  sudo apt-get -o DPkg::Lock::Timeout=600 install -qy "$@"
}

mount_runs() { # a bucket
  local there key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
  there=$(findmnt --noheadings --output=SOURCE --mountpoint="$PWD/runs" || true)
  if [ "$there" = "$1" ]; then return; fi
  if [ "$there" ]; then
    echo "launch/tpu_vm.sh: $there is mounted as ~/histo_jax/runs, not $1: name it, or unmount it on every worker (fusermount -u)" >&2
    exit 2
  fi
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL "$apt/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    install gcsfuse
  fi
  mkdir -p runs
  # Checkpoints are made whole by renaming a folder, which gcsfuse allows up to so many files only.
  # It stays, and must not keep the lock of `setup`.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$1" runs 9>&-
}

case $verb in
  setup)
    exec 9>.run/setup.lock
    flock 9
    # The usual runtimes are Ubuntu 22.04, whose own Python is 3.10.
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
    # The run, and the shell around it, hold the lock for as long as they live.
    exec 9>.run/lock
    if ! flock -w 1 9 || [ "$(cat .run/id 2>/dev/null)" = "$1" ]; then exit; fi
    rm -rf .run/status .run/pid .run/stopped
    echo "$1" >.run/id
    shift
    # shellcheck disable=SC2016  # expanded by that shell
    PYTHONUNBUFFERED=1 setsid bash -c '"$@" & echo $! >.run/pid; s=0; wait $! || s=$?; echo $s >.run/status' \
      run .venv/bin/python -m histo_jax.main --multihost=tpu "$@" </dev/null >.run/log 2>&1 &
    # Not before it has left the connection's session; on a full disk it never says so.
    until [ -s .run/pid ] || ! kill -0 $! 2>/dev/null; do sleep 0.1; done
    ;;
  state)
    exec 9>.run/lock
    if ! flock -n 9; then
      echo "histo_jax: running"
    else # 137: not even the shell around it lives
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
    # Once only: at the second signal it leaves without a save.
    if ! flock -n 9; then
      pid=$(cat .run/pid)
      if mkdir .run/stopped 2>/dev/null; then kill -TERM "$pid"; fi
    fi
    ;;
esac
