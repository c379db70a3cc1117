#!/usr/bin/env bash
# Installs histo_jax with its test tools and runs every check.
# usage: launch/test.sh [PYTEST_OPTION ...]     HISTO_JAX_SAMPLE names a folder of real patches
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
case ${1:-} in --help | -h) sed -n '2,3s/^# //p' launch/test.sh; exit ;; esac
unset PYTHONHOME
bash launch/install.sh test
# Reports an unknown option of pytest before the other checks, which take minutes.
if [ $# -gt 0 ]; then .venv/bin/python -m pytest "$@" --markers >/dev/null; fi
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
.venv/bin/lint-imports --no-logo
.venv/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
