#!/usr/bin/env bash
# Runs histo_jax on all GPUs of this machine: installs it, looks the machine over, trains.
# usage: launch/gpu_vm.sh [--records=FROM] [--dry-run] OPTION ...     options go to histo_jax.main
#   --records=FROM   a data.tfds_dir, at gs://, s3:// or a folder: its prepared records are copied to
#                    ~/tensorflow_datasets
#   --dry-run        only prints what it would do
# The same command goes on where it was stopped. Status 75: start it again.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
dry_run='' records='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) sed -n '2,7s/^# //p' launch/gpu_vm.sh; exit ;;
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

unset PYTHONHOME
case $records in
  gs://*) copy=(gcloud storage rsync --recursive) ;;
  s3://*) copy=(aws s3 sync) ;;
  *)
    copy=(cp -rT)
    if [ "$records" ] && ! [ -d "$records/histopathology" ]; then
      echo "launch/gpu_vm.sh: --records=$records: holds no prepared records; name a data.tfds_dir" >&2
      exit 2
    fi
    ;;
esac
run launch/install.sh cuda
run .venv/bin/python -m histo_jax.doctor
if [ "$records" ]; then
  run mkdir -p "$HOME/tensorflow_datasets/histopathology"
  run "${copy[@]}" "${records%/}/histopathology" "$HOME/tensorflow_datasets/histopathology"
fi
# `exec`, so that SIGTERM reaches it.
if [ -z "$dry_run" ]; then exec .venv/bin/python -m histo_jax.main ${options[@]+"${options[@]}"}; fi
run .venv/bin/python -m histo_jax.main ${options[@]+"${options[@]}"}
