#!/usr/bin/env bash
# Makes .venv in the repository and installs histo_jax into it, once per state of pyproject.toml.
# usage: launch/install.sh [EXTRA]     EXTRA: test, cuda, tpu, bench; PYTHON names the interpreter for a new .venv
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euo pipefail
case ${PYTHON:-} in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
fail() { # why
  echo "launch/install.sh: $1" >&2
  exit 2
}
extra=${1:-}
case $extra in
  --help | -h) sed -n '2,3s/^# //p' launch/install.sh; exit ;;
  "" | test | cuda | tpu | bench) ;;
  *) fail "no such extra: $extra; test, cuda, tpu or bench" ;;
esac
if [ $# -gt 1 ]; then fail "one extra at a time; start it again for $2"; fi
case $(uname) in MINGW* | MSYS* | CYGWIN*) fail "JAX needs Linux or macOS: start it in WSL" ;; esac
# Of the user's variables, what leads Python to other packages than those of .venv; PYTHON_* are others'.
for variable in "${!PYTHON@}" __PYVENV_LAUNCHER__; do
  case $variable in PYTHON | PYTHON_*) ;; *) unset "$variable" ;; esac
done

state() { # 0: installed, 3: to install into, else: to make anew (another Python, another place, half-made)
  .venv/bin/python -I -c '
import filecmp, importlib.util, os, pip, re, sys
stamp, place = sys.argv[1], os.path.realpath("histo_jax/__init__.py")
if not (3, 11) <= sys.version_info < (3, 14) or os.path.exists(".venv/unfinished"):
    sys.exit(4)
# Pip made its own script last, and in it stands where .venv was.
made = re.search("(/.*)/bin/python", open(".venv/bin/pip").read()).group(1)
if os.path.realpath(made) != os.path.realpath(".venv"):
    sys.exit(4)
found = importlib.util.find_spec("histo_jax")
if not found or not found.origin or os.path.realpath(found.origin) != place:
    sys.exit(3)
if not os.path.exists(stamp) or not filecmp.cmp(stamp, "pyproject.toml", shallow=False):
    sys.exit(3)
# What else was installed or removed there may have changed what this needs.
from importlib.metadata import requires, version
try:
    from packaging.requirements import Requirement
    needed = [each for each in map(Requirement, requires("histo_jax")) if not each.marker]
    if not all(each.specifier.contains(version(each.name), prereleases=True) for each in needed):
        sys.exit(3)
except ImportError:
    sys.exit(3)
' "$stamp" 2>/dev/null
}

lock() { # until this shell ends; `flock` is not on every system, and some file systems have no locks
  if ! [ -w launch/install.sh ]; then return; fi
  exec 8>>launch/install.sh
  "$1" -I -c '
import fcntl
try:
    fcntl.flock(8, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("another launch/install.sh is running; waiting for it", flush=True)
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
    fail "$unusable cannot make a virtual environment; on Debian: apt install python3-venv"
  elif [ "${PYTHON:-}" ]; then
    fail "PYTHON=$PYTHON is no Python 3.11 to 3.13: name another, or unset it"
  fi
  fail "no Python 3.11 to 3.13 found; install one or name it: PYTHON=/path/to/python"
}

stamp=.venv/installed${extra:+-$extra}
found=0
state || found=$?
if [ "$found" -eq 0 ]; then exit; fi
if ! [ -w . ] || { [ -d .venv ] && ! [ -w .venv ]; }; then
  fail "$PWD or its .venv cannot be written: make both yours (chown), or clone it elsewhere"
fi
if [ "$found" -eq 3 ]; then python=.venv/bin/python; else python=$(find_python); fi
lock "$python"
# Another may have installed it meanwhile.
found=0
state || found=$?
if [ "$found" -eq 0 ]; then exit; fi
if [ "$found" -ne 3 ]; then
  rm -rf .venv || fail ".venv cannot be removed, see above; remove it"
  if ! said=$("$python" -I -m venv .venv 2>&1); then
    rm -rf .venv
    fail "$python cannot make a virtual environment (is there space left?): ${said##*$'\n'}"
  fi
fi
echo "installing histo_jax${extra:+[$extra]} into .venv"
# What a killed installation leaves is no ground to build on.
touch .venv/unfinished
status=0
if [ "$extra" = bench ] && [ ! -e /dev/nvidia0 ]; then
  # PyPI's build for Linux brings gigabytes of CUDA. Of one version pip prefers a `+cpu` build;
  # where the index does not answer, pip warns and takes what else it knows.
  .venv/bin/python launch/pip_install.py --no-deps --retries 1 \
    --extra-index-url https://download.pytorch.org/whl/cpu "$(grep -o 'torch==[0-9.]*' pyproject.toml)" || status=$?
fi
if [ "$status" -eq 0 ]; then
  .venv/bin/python launch/pip_install.py --editable ".${extra:+[$extra]}" || status=$?
fi
rm -f .venv/unfinished
if [ "$status" -eq 0 ]; then cp pyproject.toml "$stamp"; fi
exit "$status"
