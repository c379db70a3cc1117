#!/usr/bin/env bash
# Runs histo_jax on all GPUs of this machine: installs it, checks the machine, trains.
# usage: launch/gpu_vm.sh [--records=SOURCE] [--dry-run] OPTION ...     options go to histo_jax.main
#   --records=SOURCE   a data.tfds_dir (gs://, s3:// or a folder) whose prepared records are copied to
#                      ~/tensorflow_datasets
#   --dry-run          prints the commands without running them
# Rerun the command to resume, also after exit status 75 (preempted).
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
      echo "launch/gpu_vm.sh: --records=$records has no prepared records: name a data.tfds_dir" >&2
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
# `exec`, so that histo_jax receives SIGTERM.
if [ -z "$dry_run" ]; then exec .venv/bin/python -m histo_jax.main ${options[@]+"${options[@]}"}; fi
run .venv/bin/python -m histo_jax.main ${options[@]+"${options[@]}"}
