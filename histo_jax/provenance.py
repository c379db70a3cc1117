"""Hashes of the code that trains a run, so that a change is reported when the run resumes."""

import hashlib
import inspect
import logging
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from histo_jax import config_files, symmetries
from histo_jax.config import ConfigFile
from histo_jax.run.workdir import Workdir
from histo_jax.training import augmentation, losses, optimizer, state, step
from histo_jax.version import VERSION

log = logging.getLogger("histo_jax")

_PACKAGE = "histo_jax"
# Besides the network, the modules that determine what a step computes.
_TRAINING = (augmentation, losses, optimizer, state, step, symmetries)
_MODELS = "histo_jax.models."
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_MOST_NAMED = 4


def source_hashes(*parts: Any, config_file: ConfigFile | None = None) -> dict[str, str]:
    """Returns the SHA-256 of the source of everything that trains a run, by name.

    These are the modules of the parts and of the network, augmentation, loss and optimizer that
    they use; functions and classes of the user that replace those of the package; the code of the
    config file; and the version of histo_jax. Parts without readable source are left out.

    Args:
        parts: functions and classes that a run is built from.
        config_file: the file that the settings come from.
    """
    sources = _collect_parts(parts)
    hashes = {
        name: _hash(part)
        for name, part in sources.items()
        if not name.startswith(config_files.MODULE)  # settings are compared one by one
    }
    if config_file and config_file.code_hash:
        hashes[Path(config_file.path).name] = config_file.code_hash
    return {name: value for name, value in sorted((hashes | {_PACKAGE: VERSION}).items()) if value}


def warn_of_changes(run: Workdir, hashes: dict[str, str]) -> None:
    """Logs in one line which code changed since `config.json` was written, if it has hashes.

    Args:
        run: folder of a run that resumes.
        hashes: what `source_hashes` returns now.
    """
    saved = run.saved_config()
    old = saved.source if saved else {}
    changed = [name for name in sorted(old | hashes) if old.get(name) != hashes.get(name)]
    if not old or not changed or not run.is_primary:
        return
    named = ", ".join(_describe(name, old, hashes) for name in changed[:_MOST_NAMED])
    more = len(changed) - _MOST_NAMED
    log.warning(
        "the code of this run has changed since its last start: %s%s; training continues with "
        "the new code", named, f" and {more} more" if more > 0 else "",
    )  # fmt: skip


def warn_of_changed_network(run: Workdir, network: type, config_file: ConfigFile | None) -> None:
    """Logs in one line which code of the network changed since the run was trained.

    Args:
        run: folder of the run.
        network: class of the network.
        config_file: the file that the settings come from.
    """
    saved = run.saved_config()
    old = saved.source if saved else {}
    hashes = source_hashes(network, config_file=config_file)
    hashes.pop(_PACKAGE)  # its modules are compared
    changed = [name for name in hashes if old.get(name, hashes[name]) != hashes[name]]
    if changed and run.is_primary:
        log.warning(
            "the code of the network has changed since the run was trained: %s; scores and "
            "predictions are those of the new code",
            ", ".join(_describe(name, old, hashes) for name in changed[:_MOST_NAMED]),
        )


def _describe(name: str, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    if name not in new:
        return f"{name} (no longer used)"
    if name not in old:
        return f"{name} (new)"
    return f"{name} ({old[name]}, now {new[name]})" if name == _PACKAGE else name


def _collect_parts(roots: Iterable[Any]) -> dict[str, Any]:
    """Returns the relevant modules of the roots and of what their globals name, by name.

    Functions and classes of the program itself, as in a notebook, are returned one by one.
    """
    parts: dict[str, Any] = {}
    waiting = list(roots)
    while waiting:
        thing = inspect.unwrap(waiting.pop())
        module_name = getattr(thing, "__name__" if inspect.ismodule(thing) else "__module__", "")
        module = sys.modules.get(module_name or "")
        is_program = module_name == "__main__"
        name = getattr(thing, "__qualname__", "") if is_program else module_name
        if not name or not (is_program or _is_relevant(module)):
            continue
        if inspect.isclass(thing):
            waiting += thing.__mro__[1:]
        if name in parts:
            continue
        parts[name] = thing if is_program else module
        if is_program:  # what the function calls, perhaps from another cell
            space = getattr(thing, "__globals__", {})
            used = getattr(getattr(thing, "__code__", None), "co_names", ())
            waiting += [space[part] for part in used if part in space]
        else:
            waiting += [
                value for value in vars(module).values()
                if inspect.ismodule(value) or inspect.isroutine(value) or inspect.isclass(value)
            ]  # fmt: skip
    return parts


def _is_relevant(module: ModuleType | None) -> bool:
    """Returns whether a module trains: the package's own part of training, or the user's."""
    if module is None:
        return False
    if module.__name__.partition(".")[0] == _PACKAGE:
        return module in _TRAINING or module.__name__.startswith(_MODELS)
    file = getattr(module, "__file__", None)
    if not file or {"site-packages", "dist-packages"} & {*Path(file).parts}:
        return False
    return not Path(file).resolve().is_relative_to(_STANDARD_LIBRARY)


def _hash(part: Any) -> str:
    """Returns the SHA-256 of the source, or nothing where it cannot be read."""
    source = _source(part)
    return hashlib.sha256(source.encode(errors="replace")).hexdigest() if source else ""


def _source(part: Any) -> str:
    try:
        return inspect.getsource(part)
    except (OSError, TypeError, SyntaxError, UnicodeDecodeError):
        # Python finds the methods of a notebook's class, but not the class.
        methods = vars(part).values() if inspect.isclass(part) else ()
        return "".join(_source(method) for method in methods if inspect.isfunction(method))
