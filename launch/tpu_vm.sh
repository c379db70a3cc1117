#!/usr/bin/env bash
# Runs histo_jax on a Cloud TPU VM or pod slice; requires gcloud.
# usage: launch/tpu_vm.sh [SETTING ...] -- OPTION ...     options are passed to histo_jax.main
#   --name=NAME        name of the TPU; created as a queued resource if missing (required)
#   --zone=ZONE        zone of the TPU (required)
#   --type=TYPE        accelerator type, such as v5litepod-16 (default: v5litepod-8)
#   --version=VERSION  runtime version of the VMs (default: v2-alpha-tpuv5-lite)
#   --spot             use spot capacity: cheaper, may be preempted
#   --records=gs://..  a data.tfds_dir whose prepared records are copied to ~/tensorflow_datasets on each
#                      worker
#   --workdirs=BUCKET  a bucket that is mounted on each worker as ~/histo_jax/runs, by gcsfuse; required
#                      for more than one worker, because all of them read the checkpoints
#   --fetch=DIR        copies runs/ of the first worker to DIR at the end
#   --stop             makes the run save and exit; does nothing else
#   --delete           deletes the TPU; does nothing else
#   --dry-run          prints the commands without running them
# The run does not depend on this script, which shows the output of the first worker: after Ctrl-C or a
# broken connection, rerun the command to follow the run, or to resume it if it has ended.
# Copies the files that git tracks, as in the working tree, and new files of histo_jax, launch and
# configs; from a download without git these three, and the files that the installation needs.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
name='' zone='' type=v5litepod-8 version=v2-alpha-tpuv5-lite spot='' records='' workdirs='' fetch=''
action='' dry_run=''
fail() { # status, message
  echo "launch/tpu_vm.sh: $2" >&2
  exit "$1"
}
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) sed -n '2,21s/^# //p' launch/tpu_vm.sh; exit ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=--spot ;;
    --records=*) records=${1#*=} ;;
    --workdirs=*) workdirs=${1#*=} ;;
    --fetch=*) fetch=${1#*=} ;;
    --stop | --delete) action=$1 ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) fail 2 "unknown setting $1 (see --help)" ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then fail 2 "--name and --zone are required (see --help)"; fi
bucket=${workdirs#gs://}
bucket=${bucket%/}
case $bucket in */*) fail 2 "--workdirs=$workdirs: name a bucket, not a folder in it" ;; esac

worker=histo_jax/launch/tpu_worker.sh
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
run() {
  if [ "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

tpus() { # subcommand of gcloud compute tpus, and its arguments
  run gcloud compute tpus "$@" "--zone=$zone"
}

all_workers() { # shell command
  tpus tpu-vm ssh "$name" --worker=all "--command=$1"
}

query() { # worker, shell command; shows the messages of gcloud only if it fails
  if tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2" 2>"$scratch/messages"; then return; fi
  cat "$scratch/messages" >&2
  return 1
}

run_states() { # state of the run on each worker
  query all "$worker state" | sed -n 's/^histo_jax: //p'
}

tpu_state() { # state of the TPU
  tpus queued-resources describe "$name" '--format=value(state.state)'
}

# shellcheck disable=SC2329  # called by run
pack() { # archive; leaves out data in the working tree
  {
    # A download may be inside another repository.
    if [ "$(git rev-parse --show-toplevel 2>/dev/null || true)" -ef . ]; then
      git ls-files -z --cached
      git ls-files -z --others --exclude-standard -- '*.py' histo_jax launch configs
    else
      find histo_jax launch configs ./*.py pyproject.toml README.md LICENSE \
        -type f ! -path '*/__pycache__/*' -print0 2>/dev/null || true
    fi
  } | while IFS= read -r -d '' path; do
    if [ -e "$path" ]; then printf '%s\0' "$path"; fi
  done | COPYFILE_DISABLE=1 tar -czf "$1" --null -T -
}

case $action in
  --stop) all_workers "$worker stop"; exit ;;
  --delete) tpus queued-resources delete "$name" --force --quiet; exit ;;
esac

tpu=''
if [ -z "$dry_run" ]; then tpu=$(tpu_state 2>/dev/null || true); fi
if [ -z "$tpu" ]; then
  tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
    "--runtime-version=$version" ${spot:+"$spot"}
fi
failures=0
until [ "$dry_run" ] || [ "$tpu" = ACTIVE ]; do
  case $tpu in
    FAILED | SUSPENDED) fail 1 "$name is $tpu: delete it (--delete) and rerun the command" ;;
  esac
  if [ "$failures" -ge 5 ]; then fail 1 "gcloud does not describe $name, see above: fix this and rerun the command"; fi
  echo "waiting for $name: ${tpu:-not created yet}"
  sleep "${HISTO_JAX_POLL_SECONDS:-30}"
  if tpu=$(tpu_state); then failures=0; else failures=$((failures + 1)); fi
done

follow() { # shows the output until the run has ended on all workers; returns its status
  local lines=0 failures=0 states text status
  while true; do
    if states=$(run_states) && text=$(query 0 "$worker log $lines"); then
      failures=0
      # The last line is the number of lines.
      sed '$d' <<<"$text"
      lines=${text##*$'\n'}
      case $states in *running*) ;; *) break ;; esac
    elif failures=$((failures + 1)); [ "$failures" -ge 5 ]; then
      fail 1 "$name does not respond, see above: rerun the command to follow or resume the run"
    fi
    sleep "${HISTO_JAX_POLL_SECONDS:-30}"
  done
  # The error of one worker is the cause of the statuses of the others.
  status=$(sort -n <<<"$states" | tail -n 1)
  status=$(grep -x '[12]' <<<"$states" | tail -n 1 || echo "$status")
  if [ "$status" -ne 0 ] && [ "$(wc -l <<<"$states")" -gt 1 ]; then
    # shellcheck disable=SC2016  # expanded on the workers
    all_workers 'tail -n 5 histo_jax/.run/log | sed "s/^/$(hostname): /"' || true
  fi
  return "$status"
}

options=''
if [ $# -gt 0 ]; then options=$(printf ' %q' "$@"); fi
if [ -z "$dry_run" ] && [[ $(run_states 2>/dev/null || true) = *running* ]]; then
  launch=()
  echo "following the run that is in progress"
else
  if [ -z "$dry_run$bucket" ]; then
    count=$(tpus tpu-vm describe "$name" '--format=value(networkEndpoints.len())' || true)
    if [ "${count:-1}" -gt 1 ]; then
      fail 2 "$name has $count workers, which must share the workdir: set --workdirs to a bucket"
    fi
  fi
  run pack "$scratch/histo_jax.tar.gz"
  tpus tpu-vm scp "$scratch/histo_jax.tar.gz" "$name:histo_jax.tar.gz" --worker=all
  # Not during a run: the query of its state may have failed.
  all_workers "if [ -e $worker ] && ! $worker idle; then echo 'a run is in progress: rerun the command to follow it' >&2; exit 1; fi
    mkdir -p histo_jax && cd histo_jax && find . -mindepth 1 -maxdepth 1 ! -name runs \
    ! -name .venv ! -name .run -exec rm -rf {} + && tar -xzf ../histo_jax.tar.gz"
  all_workers "$worker setup $(printf '%q %q' "$bucket" "$records")"
  launch=(all_workers "$worker start $(date +%s)-$$$options")
fi

status=0
if [ "$dry_run" ]; then
  ${launch[@]+"${launch[@]}"}
else
  # In the background, because bash handles Ctrl-C only after a program in the foreground ends.
  { ${launch[@]+"${launch[@]}"}; follow; } &
  follower=$!
  trap 'kill "$follower"; echo; fail 130 "the run continues: rerun the command to follow it, or use --stop to save and exit"' INT
  wait "$follower" || status=$?
  trap - INT
fi
if [ "$fetch" ]; then
  run mkdir -p "$fetch"
  if ! tpus tpu-vm scp --recurse "$name:histo_jax/runs" "$fetch" --worker=0; then
    echo "launch/tpu_vm.sh: runs/ could not be fetched: rerun the command" >&2
    if [ "$status" -eq 0 ]; then status=1; fi
  fi
fi
exit "$status"
