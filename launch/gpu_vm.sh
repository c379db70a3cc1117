#!/usr/bin/env bash
# Runs histo_jax on all GPUs of this machine: installs it, looks the machine over, trains.
# usage: launch/gpu_vm.sh [--records=FROM] [--dry-run] OPTION ...     options go to histo_jax.main
#   --records=FROM   gs://.., s3://.. or a folder: prepared records, copied to ~/tensorflow_datasets
#   --dry-run        only prints what it would do
# The same command goes on where it was stopped. Status 75: start it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run='' records='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) sed -n '2,6s/^# //p' launch/gpu_vm.sh; exit ;;
    --dry-run) dry_run=1 ;;
    --records=*) records=${1#*=} ;;
    --) shift; options+=("$@"); break ;;
    *) options+=("$1") ;;
  esac
  shift
done

run() {
  if [ "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

case $records in
  gs://*) copy=(gcloud storage rsync --recursive) ;;
  s3://*) copy=(aws s3 sync) ;;
  *)
    copy=(cp -rT)
    if [ "$records" ] && ! [ -d "$records" ]; then
      echo "launch/gpu_vm.sh: --records=$records: no such folder; gs://, s3:// or a folder" >&2
      exit 2
    fi
    ;;
esac
run launch/install.sh cuda
run .venv/bin/python -m histo_jax.doctor
if [ "$records" ]; then
  run mkdir -p "$HOME/tensorflow_datasets"
  run "${copy[@]}" "$records" "$HOME/tensorflow_datasets"
fi
# `exec`, so that SIGTERM reaches it.
if [ -z "$dry_run" ]; then exec .venv/bin/python -m histo_jax.main "${options[@]}"; fi
run .venv/bin/python -m histo_jax.main "${options[@]}"
