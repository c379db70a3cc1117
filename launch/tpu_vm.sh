#!/usr/bin/env bash
# Runs histo_jax on a Cloud TPU VM or pod slice; needs gcloud alone.
# usage: launch/tpu_vm.sh [SETTING ...] -- OPTION ...     options go to histo_jax.main
#   --name=NAME        of the TPU; made as a queued resource if it is not there (required)
#   --zone=ZONE        where (required)
#   --type=TYPE        accelerator, such as v5litepod-16 (v5litepod-8)
#   --version=VERSION  runtime of the VMs (v2-alpha-tpuv5-lite)
#   --spot             cheaper, and can be taken away
#   --records=gs://..  prepared records, copied to ~/tensorflow_datasets on every worker
#   --workdirs=BUCKET  a bucket that every worker sees as ~/histo_jax/runs (by gcsfuse); needed where
#                      there is more than one worker, for all of them read the checkpoints
#   --fetch=DIR        copies runs/ of the first worker to DIR at the end
#   --delete           deletes the TPU and does nothing else
#   --dry-run          only prints what it would do
# The same command uses the TPU that is there, and the run goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name='' zone='' type=v5litepod-8 version=v2-alpha-tpuv5-lite spot='' records='' workdirs='' fetch=''
delete='' dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) sed -n '2,16s/^# //p' launch/tpu_vm.sh; exit ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=--spot ;;
    --records=*) records=${1#*=} ;;
    --workdirs=*) workdirs=${1#*=} ;;
    --fetch=*) fetch=${1#*=} ;;
    --delete) delete=1 ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) echo "launch/tpu_vm.sh: unknown setting $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then
  echo "launch/tpu_vm.sh: --name and --zone are needed (see --help)" >&2
  exit 2
fi

run() {
  if [ "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

tpus() { # command of gcloud compute tpus, then its arguments
  run gcloud compute tpus "$@" "--zone=$zone"
}

everywhere() { # a shell command
  tpus tpu-vm ssh "$name" --worker=all "--command=$1"
}

state() {
  gcloud compute tpus queued-resources describe "$name" "--zone=$zone" '--format=value(state.state)' 2>/dev/null
}

if [ "$delete" ]; then
  tpus queued-resources delete "$name" --force --quiet
  exit
fi

found=''
if [ -z "$dry_run" ]; then found=$(state || true); fi
if [ -z "$found" ]; then
  tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
    "--runtime-version=$version" ${spot:+"$spot"}
fi
if [ -z "$dry_run" ]; then
  until found=$(state) && [ "$found" = ACTIVE ]; do
    case $found in
      FAILED | SUSPENDED)
        echo "launch/tpu_vm.sh: $name is $found: delete it (--delete) and start again" >&2
        exit 1
        ;;
    esac
    echo "waiting for $name: ${found:-not there yet}"
    sleep "${HISTO_JAX_POLL_SECONDS:-30}"
  done
fi

code=$(mktemp -d)
trap 'rm -rf "$code"' EXIT
run git archive --format=tar.gz "--output=$code/histo_jax.tar.gz" HEAD
tpus tpu-vm scp "$code/histo_jax.tar.gz" "$name:histo_jax.tar.gz" --worker=all
# The usual runtimes are Ubuntu 22.04, whose own Python is 3.10.
everywhere 'command -v python3.13 || command -v python3.12 || command -v python3.11 || { sudo apt-get update -q && sudo apt-get install -qy python3.11-venv; }'
everywhere 'mkdir -p histo_jax && tar -xzf histo_jax.tar.gz -C histo_jax && histo_jax/launch/install.sh tpu'
if [ "$records" ]; then
  everywhere "mkdir -p tensorflow_datasets && gcloud storage rsync --recursive $(printf %q "$records") tensorflow_datasets"
fi
if [ "$workdirs" ]; then
  # Checkpoints are made whole by renaming a folder, which gcsfuse allows up to so many files only.
  everywhere "mkdir -p histo_jax/runs && { mountpoint -q histo_jax/runs || gcsfuse --implicit-dirs --rename-dir-limit=100000 $(printf %q "$workdirs") histo_jax/runs; }"
fi
options=''
if [ $# -gt 0 ]; then options=$(printf ' %q' "$@"); fi
status=0
everywhere "cd histo_jax && .venv/bin/python -m histo_jax.main --multihost=tpu$options" || status=$?
if [ "$fetch" ]; then
  run mkdir -p "$fetch"
  tpus tpu-vm scp --recurse "$name:histo_jax/runs" "$fetch" --worker=0
fi
exit "$status"
