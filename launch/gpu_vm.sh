#!/usr/bin/env bash
# Runs histo_jax on all GPUs of this machine: installs it, looks the machine over, trains.
# usage: launch/gpu_vm.sh [--dry-run] OPTION ...     options go to histo_jax.main; --dry-run only prints
# The same command goes on where it was stopped. Status 75: preempted after a save.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry_run=
case ${1:-} in
  --help | -h) sed -n '2,4s/^# //p' launch/gpu_vm.sh; exit ;;
  --dry-run) dry_run=1; shift ;;
esac

run() {
  if [ "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

run launch/install.sh cuda
run .venv/bin/python -m histo_jax.doctor
# `exec`, so that SIGTERM reaches it.
if [ -z "$dry_run" ]; then exec .venv/bin/python -m histo_jax.main "$@"; fi
run .venv/bin/python -m histo_jax.main "$@"
