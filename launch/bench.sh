#!/usr/bin/env bash
# Installs histo_jax and the frameworks that it is compared with; prints a table of timings and writes
# runs/bench.json.
# usage: launch/bench.sh [OPTION ...]     --help lists the options
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
unset PYTHONHOME
# Options are checked without packages, before gigabytes are installed.
for python in .venv/bin/python python3 python; do
  if "$python" -c '' 2>/dev/null; then
    "$python" tests/benchmarks/options.py "$@"
    case " $* " in *" --help "* | *" -h "*) exit ;; esac
    break
  fi
done
if [ -e /dev/nvidia0 ]; then bash launch/install.sh cuda; fi
bash launch/install.sh bench
exec .venv/bin/python tests/benchmarks/bench.py "$@"
