#!/usr/bin/env bash
# Installs histo_jax with its test tools and runs every check.
# usage: launch/test.sh [PYTEST_OPTION ...]     HISTO_JAX_SAMPLE names a folder of real patches
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/install.sh test
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
.venv/bin/lint-imports --no-logo
.venv/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
