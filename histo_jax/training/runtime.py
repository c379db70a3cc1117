"""How the process is set up before its first step: what was compiled, and freed memory, is kept."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import jax

from histo_jax.training import hosts

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
        jax.config.update("jax_compilation_cache_dir", str(Path(caches, "histo_jax", "compiled")))
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.default_backend() == "cpu" and sys.platform == "linux":
        # Every step allocates hundreds of megabytes. Given back to the system after it, they come
        # back page by page: measured, that was a quarter of a step.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            for setting, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
                mallopt(setting, value)
