#!/usr/bin/env bash
# Creates .venv in the repository and installs histo_jax into it, unless that is up to date.
# usage: launch/install.sh [EXTRA]     EXTRA: test, slides, serve, cuda, tpu or bench; PYTHON names the interpreter of a new .venv
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
case ${PYTHON:-} in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
fail() { # message
  echo "launch/install.sh: $1" >&2
  exit 2
}
extra=${1:-}
case $extra in
  --help | -h) sed -n '2,3s/^# //p' launch/install.sh; exit ;;
  "" | test | slides | serve | cuda | tpu | bench) ;;
  *) fail "unknown extra $extra: test, slides, serve, cuda, tpu or bench" ;;
esac
if [ $# -gt 1 ]; then fail "one extra at a time: rerun for $2"; fi
case $(uname) in MINGW* | MSYS* | CYGWIN*) fail "JAX needs Linux or macOS: run this in WSL" ;; esac
# Variables that make Python import packages from outside .venv; PYTHON_* belong to other programs.
for variable in "${!PYTHON@}" __PYVENV_LAUNCHER__; do
  case $variable in PYTHON | PYTHON_*) ;; *) unset "$variable" ;; esac
done

check_installation() { # 0: up to date, 3: packages missing, else: to be created (other Python, moved, incomplete)
  .venv/bin/python -I -c '
import filecmp, importlib.util, os, pip, re, sys
stamp, package = sys.argv[1], os.path.realpath("histo_jax/__init__.py")
if not (3, 11) <= sys.version_info < (3, 14) or os.path.exists(".venv/unfinished"):
    sys.exit(4)
# The script of pip, which is installed last, names the location of .venv.
location = re.search("(/.*)/bin/python", open(".venv/bin/pip").read()).group(1)
if os.path.realpath(location) != os.path.realpath(".venv"):
    sys.exit(4)
spec = importlib.util.find_spec("histo_jax")
if not spec or not spec.origin or os.path.realpath(spec.origin) != package:
    sys.exit(3)
if not os.path.exists(stamp) or not filecmp.cmp(stamp, "pyproject.toml", shallow=False):
    sys.exit(3)
# Other installations into .venv may have changed or removed the requirements.
from importlib.metadata import requires, version
try:
    from packaging.requirements import Requirement
    required = [item for item in map(Requirement, requires("histo_jax")) if not item.marker]
    if not all(item.specifier.contains(version(item.name), prereleases=True) for item in required):
        sys.exit(3)
except ImportError:
    sys.exit(3)
' "$stamp" 2>/dev/null
}

lock() { # until this shell exits; some systems lack `flock`, and some file systems locks
  if ! [ -w launch/install.sh ]; then return; fi
  exec 8>>launch/install.sh
  "$1" -I -c '
import fcntl
try:
    fcntl.flock(8, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("waiting for another launch/install.sh to finish", flush=True)
    fcntl.flock(8, fcntl.LOCK_EX)
except OSError:
    pass
'
}

find_python() {
  local candidate unusable=''
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -I -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      if "$candidate" -I -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$candidate"
        return
      fi
      unusable=$candidate
    fi
    if [ "$candidate" = "${PYTHON:-}" ]; then break; fi
  done
  if [ "$unusable" ]; then
    fail "$unusable cannot create a virtual environment; on Debian: apt install python3-venv"
  elif [ "${PYTHON:-}" ]; then
    fail "PYTHON=$PYTHON is not Python 3.11 to 3.13: name another, or unset it"
  fi
  fail "no Python 3.11 to 3.13 found: install one, or set PYTHON=/path/to/python"
}

stamp=.venv/installed${extra:+-$extra}
state=0
check_installation || state=$?
if [ "$state" -eq 0 ]; then exit; fi
if ! [ -w . ] || { [ -d .venv ] && ! [ -w .venv ]; }; then
  fail "$PWD or its .venv cannot be written: change the owner of both (chown), or clone elsewhere"
fi
if [ "$state" -eq 3 ]; then python=.venv/bin/python; else python=$(find_python); fi
lock "$python"
# Another process may have installed it meanwhile.
state=0
check_installation || state=$?
if [ "$state" -eq 0 ]; then exit; fi
if [ "$state" -ne 3 ]; then
  rm -rf .venv || fail ".venv cannot be removed, see above: remove it"
  if ! output=$("$python" -I -m venv .venv 2>&1); then
    rm -rf .venv
    fail "$python cannot create a virtual environment (is there space left?): ${output##*$'\n'}"
  fi
fi
echo "installing histo_jax${extra:+[$extra]} into .venv"
# Marks an incomplete installation; if it is killed, the next one starts from scratch.
touch .venv/unfinished
status=0
if [ "$extra" = bench ] && [ ! -e /dev/nvidia0 ]; then
  # The build for Linux on PyPI depends on gigabytes of CUDA. Of equal versions pip prefers a `+cpu`
  # build; if that index does not respond, pip warns and uses the other one.
  .venv/bin/python launch/pip_install.py --no-deps --retries 1 \
    --extra-index-url https://download.pytorch.org/whl/cpu "$(grep -o 'torch==[0-9.]*' pyproject.toml)" || status=$?
fi
if [ "$status" -eq 0 ]; then
  .venv/bin/python launch/pip_install.py --editable ".${extra:+[$extra]}" || status=$?
fi
rm -f .venv/unfinished
if [ "$status" -eq 0 ]; then cp pyproject.toml "$stamp"; fi
exit "$status"
