#!/usr/bin/env bash
# Installs histo_jax with its peers and prints how they compare; also as JSON in runs/bench.json.
# usage: launch/bench.sh [OPTION ...]     options go to tests/benchmarks/bench.py; --help lists them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -e /dev/nvidia0 ]; then launch/install.sh cuda; fi
launch/install.sh bench
exec .venv/bin/python tests/benchmarks/bench.py "$@"
