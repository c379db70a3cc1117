#!/usr/bin/env bash
# Runs histo_jax on a Cloud TPU VM or pod slice; needs gcloud alone.
# usage: launch/tpu_vm.sh [SETTING ...] -- OPTION ...     options go to histo_jax.main
#   --name=NAME        of the TPU; made as a queued resource if it is not there (required)
#   --zone=ZONE        where (required)
#   --type=TYPE        accelerator, such as v5litepod-16 (v5litepod-8)
#   --version=VERSION  runtime of the VMs (v2-alpha-tpuv5-lite)
#   --spot             cheaper, and can be taken away
#   --records=gs://..  a data.tfds_dir: its prepared records are copied to ~/tensorflow_datasets on every
#                      worker
#   --workdirs=BUCKET  a bucket that every worker sees as ~/histo_jax/runs (by gcsfuse); needed where
#                      there is more than one worker, for all of them read the checkpoints
#   --fetch=DIR        copies runs/ of the first worker to DIR at the end
#   --stop             lets the run save and leave, and does nothing else
#   --delete           deletes the TPU and does nothing else
#   --dry-run          only prints what it would do
# The run does not depend on this script, which shows what the first worker says: after Ctrl-C or a
# broken connection the same command follows the run that is there, or goes on where it was stopped.
# Code: what git knows, as it is in the working tree, and new files of histo_jax, launch and configs;
# from a download without git these three, and the files beside them that an installation needs.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
name='' zone='' type=v5litepod-8 version=v2-alpha-tpuv5-lite spot='' records='' workdirs='' fetch=''
verb='' dry_run=''
fail() { # status, why
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
    --stop | --delete) verb=$1 ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) fail 2 "unknown setting $1 (see --help)" ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then fail 2 "--name and --zone are needed (see --help)"; fi
bucket=${workdirs#gs://}
bucket=${bucket%/}
case $bucket in */*) fail 2 "--workdirs=$workdirs: name a bucket, not a folder in one" ;; esac

worker=histo_jax/launch/tpu_worker.sh
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
run() {
  if [ "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

tpus() { # command of gcloud compute tpus, then its arguments
  run gcloud compute tpus "$@" "--zone=$zone"
}

everywhere() { # a shell command
  tpus tpu-vm ssh "$name" --worker=all "--command=$1"
}

ask() { # worker, shell command; what gcloud itself says is shown where it fails
  if tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2" 2>"$scratch/said"; then return; fi
  cat "$scratch/said" >&2
  return 1
}

states() { # of the run on each worker
  ask all "$worker state" | sed -n 's/^histo_jax: //p'
}

state() { # of the TPU
  tpus queued-resources describe "$name" '--format=value(state.state)'
}

# shellcheck disable=SC2329  # called by run
pack() { # a file; raw data may lie beside the code
  {
    # A download may be unpacked inside another repository.
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

case $verb in
  --stop) everywhere "$worker stop"; exit ;;
  --delete) tpus queued-resources delete "$name" --force --quiet; exit ;;
esac

found=''
if [ -z "$dry_run" ]; then found=$(state 2>/dev/null || true); fi
if [ -z "$found" ]; then
  tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
    "--runtime-version=$version" ${spot:+"$spot"}
fi
failures=0
until [ "$dry_run" ] || [ "$found" = ACTIVE ]; do
  case $found in
    FAILED | SUSPENDED) fail 1 "$name is $found: delete it (--delete) and start again" ;;
  esac
  if [ "$failures" -ge 5 ]; then fail 1 "gcloud says nothing of $name, see above; mend that and start again"; fi
  echo "waiting for $name: ${found:-not there yet}"
  sleep "${HISTO_JAX_POLL_SECONDS:-30}"
  if found=$(state); then failures=0; else failures=$((failures + 1)); fi
done

follow() { # until the run has ended on all workers; returns its status
  local lines=0 failures=0 found text status
  while true; do
    if found=$(states) && text=$(ask 0 "$worker log $lines"); then
      failures=0
      # Its last line is the number of lines.
      sed '$d' <<<"$text"
      lines=${text##*$'\n'}
      case $found in *running*) ;; *) break ;; esac
    elif failures=$((failures + 1)); [ "$failures" -ge 5 ]; then
      fail 1 "$name does not answer, see above; the same command follows the run, or goes on with it"
    fi
    sleep "${HISTO_JAX_POLL_SECONDS:-30}"
  done
  # One worker's own mistake is the cause of what the others have ended with.
  status=$(sort -n <<<"$found" | tail -n 1)
  status=$(grep -x '[12]' <<<"$found" | tail -n 1 || echo "$status")
  if [ "$status" -ne 0 ] && [ "$(wc -l <<<"$found")" -gt 1 ]; then
    # shellcheck disable=SC2016  # expanded on the workers
    everywhere 'tail -n 5 histo_jax/.run/log | sed "s/^/$(hostname): /"' || true
  fi
  return "$status"
}

options=''
if [ $# -gt 0 ]; then options=$(printf ' %q' "$@"); fi
if [ -z "$dry_run" ] && [[ $(states 2>/dev/null || true) = *running* ]]; then
  begin=()
  echo "a run is there already; following that"
else
  if [ -z "$dry_run$bucket" ]; then
    count=$(tpus tpu-vm describe "$name" '--format=value(networkEndpoints.len())' || true)
    if [ "${count:-1}" -gt 1 ]; then
      fail 2 "$name has $count workers, and all must see the workdir: give a bucket by --workdirs"
    fi
  fi
  run pack "$scratch/histo_jax.tar.gz"
  tpus tpu-vm scp "$scratch/histo_jax.tar.gz" "$name:histo_jax.tar.gz" --worker=all
  # Not under a run: what asked for its state may just have failed.
  everywhere "if [ -e $worker ] && ! $worker idle; then echo 'a run is there already; start again to follow it' >&2; exit 1; fi
    mkdir -p histo_jax && cd histo_jax && find . -mindepth 1 -maxdepth 1 ! -name runs \
    ! -name .venv ! -name .run -exec rm -rf {} + && tar -xzf ../histo_jax.tar.gz"
  everywhere "$worker setup $(printf '%q %q' "$bucket" "$records")"
  begin=(everywhere "$worker start $(date +%s)-$$$options")
fi

status=0
if [ "$dry_run" ]; then
  ${begin[@]+"${begin[@]}"}
else
  # Beside this shell, which only waits: while bash runs a program, that alone may get Ctrl-C.
  { ${begin[@]+"${begin[@]}"}; follow; } &
  follower=$!
  trap 'kill "$follower"; echo; fail 130 "the run goes on; the same command follows it, and --stop lets it save and leave"' INT
  wait "$follower" || status=$?
  trap - INT
fi
if [ "$fetch" ]; then
  run mkdir -p "$fetch"
  if ! tpus tpu-vm scp --recurse "$name:histo_jax/runs" "$fetch" --worker=0; then
    echo "launch/tpu_vm.sh: runs/ could not be fetched; the same command tries again" >&2
    if [ "$status" -eq 0 ]; then status=1; fi
  fi
fi
exit "$status"
