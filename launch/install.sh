#!/usr/bin/env bash
# Makes .venv in the repository and installs histo_jax into it, once per state of pyproject.toml.
# usage: launch/install.sh [EXTRA]     EXTRA: test, cuda, tpu, bench; PYTHON names the interpreter to use
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
case $extra in
  --help | -h) sed -n '2,3s/^# //p' launch/install.sh; exit ;;
  "" | test | cuda | tpu | bench) ;;
  *) echo "launch/install.sh: no such extra: $extra; test, cuda, tpu or bench" >&2; exit 2 ;;
esac

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "launch/install.sh: no Python 3.11 to 3.13 found; install one or name it: PYTHON=/path/to/python" >&2
  exit 2
}

if ! .venv/bin/python -c '' 2>/dev/null; then
  python=$(find_python)
  rm -rf .venv
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    echo "launch/install.sh: $python cannot make a virtual environment; on Debian: apt install python3-venv" >&2
    exit 2
  fi
fi
# The stamp is written last, so that a broken installation is done again.
stamp=.venv/installed${extra:+-$extra}
if ! cmp -s pyproject.toml "$stamp"; then
  echo "installing histo_jax${extra:+[$extra]} into .venv"
  if [ "$extra" = bench ] && [ ! -e /dev/nvidia0 ]; then
    # PyPI's build for Linux brings gigabytes of CUDA. Of one version pip prefers a `+cpu` build;
    # where the index does not answer, pip warns and takes what else it knows.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --retries 1 \
      --extra-index-url https://download.pytorch.org/whl/cpu "$(grep -o 'torch==[0-9.]*' pyproject.toml)"
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
  cp pyproject.toml "$stamp"
fi
