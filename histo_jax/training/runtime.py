"""How the process is set up before its first step: what was compiled, and freed memory, is kept."""

import contextlib
import ctypes
import functools
import importlib.metadata
import logging
import os
import platform
import sys
from pathlib import Path

import jax

from histo_jax import files
from histo_jax.errors import one_line
from histo_jax.training import hosts

log = logging.getLogger("histo_jax")

_CACHE_BYTES = 2**30
_PACKAGES = ("histo_jax", "jax", "flax", "optax", "numpy")
# Names of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def versions() -> dict[str, str]:
    """Returns what computes here: Python, the packages that results depend on, the devices."""
    devices, found = jax.devices(), dict.fromkeys(_PACKAGES, "unknown")
    for name in _PACKAGES:
        # A clone that runs without being installed has none.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        **found,
        "devices": f"{len(devices)} {devices[0].device_kind}",
    }


def set_up() -> None:
    """Turns on the compilation cache in the user's cache folder; on CPU, keeps freed memory.

    Of several processes only the first writes files and talks.

    A folder that `JAX_COMPILATION_CACHE_DIR` or `jax_compilation_cache_dir` names is left as it is.
    """
    hosts.give_roles()
    if not jax.config.values["jax_compilation_cache_dir"]:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(caches, "histo_jax", "compiled")
        if _can_cache(folder):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.default_backend() == "cpu" and sys.platform == "linux":
        # Every step allocates hundreds of megabytes. Given back to the system after it, they come
        # back page by page: measured, that was a quarter of a step.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            for setting, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
                mallopt(setting, value)


@functools.cache
def _can_cache(folder: Path) -> bool:
    """Whether compiled programs can be kept in `folder`; removes what a killed process left there.

    JAX writes a program, then its time. Where one of them is missing it would never write again.
    """
    if files.is_special(folder):
        return False  # JAX would take it for a pattern
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(f"{folder} cannot be written")
        with files.open_lock(folder / ".lockfile") as file:  # JAX's own
            if not files.lock(file):
                raise OSError(f"the file system of {folder} keeps no locks")
            for path in folder.glob("*-*"):
                stem, _, kind = path.name.rpartition("-")
                other = {"cache": "atime", "atime": "cache"}.get(kind)
                if other and not (path.stat().st_size and (folder / f"{stem}-{other}").exists()):
                    path.unlink()
    except BlockingIOError:
        pass  # another process is at work there
    except OSError as error:
        log.info("compiled programs are not kept for the next time (%s)", one_line(error))
        return False
    return True
