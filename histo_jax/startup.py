"""Checks Python and its packages before anything else is imported.

`histo_jax/__init__.py` imports it first, on any Python 3, so it imports only `sys` at first.
"""

import sys

_MODULES = ("histo_jax.main", "histo_jax.doctor", "histo_jax.serve")
# The console scripts.
_SCRIPTS = {"histo_jax": "histo_jax.main", "histo_jax-serve": "histo_jax.serve"}
_EXPECTED_FAILURE = 2


def check() -> None:
    """Exits with one line if a command starts on a Python that is too old or has no packages.

    Raises:
        ImportError: another program imports the package on a Python that is too old.
    """
    name = command()
    if sys.version_info < (3, 11):  # noqa: UP036 - it may come from the clone, not from pip
        version = ".".join(map(str, sys.version_info[:2]))
        text = f"Python {version} is too old: histo_jax needs 3.11 to 3.13"
        if not name:
            raise ImportError(text)
        fail(f"{text}; {_installation(name)}")
    if not name:
        return
    _prefer_packages_to_the_current_folder()
    import importlib.util

    if not importlib.util.find_spec("absl"):
        fail(f"the packages are not installed for {sys.executable}: {_installation(name)}")


def explain(error: ImportError) -> str:
    """Returns which library cannot be imported, why, and the fix; '' for a bug of this package."""
    trace, modules = error.__traceback__, [""]
    while trace:
        module = trace.tb_frame.f_globals.get("__name__", "")
        # Only what this package imports matters, not what calls it.
        modules = [] if module == "__main__" or _is_own(module) else [*modules, module]
        trace = trace.tb_next
    modules.append(error.name or "")
    module = next((name for name in modules if name and not name.startswith("importlib")), "")
    if not module or _is_own(module):
        return ""
    fix = _installation(_MODULES[0], is_broken=True)
    return f"{module.partition('.')[0]} cannot be imported ({error}): {fix}"


def fail(text: str) -> None:
    """Exits with one line and the status of an expected failure."""
    sys.stderr.write(f"histo_jax: {' '.join(text.split())}\n")
    sys.exit(_EXPECTED_FAILURE)


def command() -> str:
    """Returns which module of this package is being started, '' if another program imports it."""
    script = sys.argv[0] if sys.argv else ""
    name = script.replace("\\", "/").rpartition("/")[2].partition(".exe")[0]
    if name in _SCRIPTS:
        return _SCRIPTS[name]
    if script != "-m":  # which it is until Python has found the module
        return _main_module()
    words = getattr(sys, "orig_argv", _MODULES[:1])  # new in Python 3.10
    return next((name for name in _MODULES for word in words if word.endswith(name)), "")


def _main_module() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = getattr(spec, "name", "").partition(".__main__")[0]
    return name if name in _SCRIPTS.values() else ""


def _is_own(module: str) -> bool:
    return module.partition(".")[0] == __package__


def _prefer_packages_to_the_current_folder() -> None:
    """Searches the current folder last, so that a jax.py or random.py there hides no library.

    Modules that a config file imports from there are still found.
    """
    if getattr(sys.flags, "safe_path", False):
        return  # the folder is not on the path
    import os

    first = sys.path.pop(0)  # the current folder, or that of the console script
    folder = first if sys.argv[0] == "-m" else os.getcwd()
    ends = ("site-packages", "dist-packages", "lib-dynload")
    last = max((at for at, path in enumerate(sys.path) if path.endswith(ends)), default=-1)
    # Before the clone, which an editable installation adds to the path.
    sys.path.insert(last + 1, folder)


def _installation(name: str, is_broken: bool = False) -> str:
    import os

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.exists(os.path.join(root, "launch", "install.sh")):
        return "reinstall histo_jax with pip"
    prefix = "" if root == os.getcwd() else root + "/"
    first = f"remove {prefix}.venv, run" if is_broken else "run"
    return f"{first} {prefix}launch/install.sh, then {prefix}.venv/bin/python -m {name}"
