"""How JAX is set up for a command: its defaults, a compilation cache, and freed memory is kept."""

import contextlib
import ctypes
import functools
import importlib.metadata
import logging
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from histo_jax import environment
from histo_jax.distributed import processes
from histo_jax.errors import UserError, one_line
from histo_jax.run import files
from histo_jax.version import VERSION

log = logging.getLogger("histo_jax")

_CACHE_BYTES = 2**30
_PACKAGES = ("jax", "flax", "optax", "numpy")
# Names of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
# JAX's defaults for what changes results, or stops a run; each is a context manager of `jax`.
_PINNED = {
    "enable_x64": False,
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "default_matmul_precision": None,
    "default_prng_impl": "threefry2x32",
    "threefry_partitionable": True,
    "enable_custom_prng": False,
    "legacy_prng_key": "allow",
    "default_device": None,
    "transfer_guard": "allow",
    "disable_jit": False,
    "no_tracing": False,
    "no_execution": False,
    "debug_nans": False,
    "debug_infs": False,
    "debug_key_reuse": False,
    "check_tracer_leaks": False,
    "log_compiles": False,
    "explain_cache_misses": False,
}
# These have no context manager.
_REFUSED = {"jax_random_seed_offset": 0, "jax_disable_most_optimizations": False}


def versions() -> dict[str, str]:
    """Returns what computes here: Python, the packages that results depend on, the devices."""
    devices, found = jax.devices(), dict.fromkeys(_PACKAGES, "unknown")
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "histo_jax": VERSION,
        **found,
        "devices": f"{len(devices)} {devices[0].device_kind}",
    }


@contextlib.contextmanager
def jax_defaults() -> Iterator[None]:
    """JAX's configuration as it is by default, in this thread, until the end.

    Raises:
        UserError: an option that cannot be set for a while differs; names its variable.
    """
    for option, default in _REFUSED.items():
        found = jax.config.values.get(option, default)
        if found != default:
            raise UserError(
                f"{option.upper()}={found} changes the results: unset it, or set it to {default}"
            )
    with contextlib.ExitStack() as stack:
        for name, value in _PINNED.items():
            if hasattr(jax, name):  # not every version has all
                stack.enter_context(getattr(jax, name)(value))
        yield


def set_up() -> None:
    """Turns on the compilation cache in the user's cache folder; on CPU, keeps freed memory.

    Of several processes only the first writes files and talks.

    A folder that `JAX_COMPILATION_CACHE_DIR` or `jax_compilation_cache_dir` names is used instead.

    Raises:
        UserError: JAX finds no device; names the variables that choose it.
    """
    check_devices()
    processes.assign_roles()
    _set_up_cache()
    if jax.default_backend() == "cpu" and sys.platform == "linux":
        # Every step allocates hundreds of megabytes. Given back to the system after it, they come
        # back page by page: measured, that was a quarter of a step.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            for setting, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
                mallopt(setting, value)


def check_devices() -> None:
    """Starts JAX's devices.

    Raises:
        UserError: there is none; names the variables that choose it.
    """
    try:
        jax.devices()
    except Exception as error:  # of whatever plug-in
        chosen = environment.variables("JAX_PLATFORM", "CUDA_VISIBLE", "XLA_PYTHON")
        raise UserError(
            f"JAX finds no device ({one_line(error)}): correct or unset {chosen}; "
            "JAX_PLATFORMS=cpu works everywhere"
        ) from None


def _set_up_cache() -> None:
    chosen = jax.config.values["jax_compilation_cache_dir"]
    folder = Path(chosen) if chosen else cache_folder()
    if chosen and "://" in chosen:
        return
    if folder is None:
        log.warning("compiled programs are not kept: there is no home folder; set XDG_CACHE_HOME")
    elif problem := _cache_problem(folder):
        jax.config.update("jax_compilation_cache_dir", None)
        log.warning(
            "compiled programs are not kept: %s; set %s to another folder",
            problem, "JAX_COMPILATION_CACHE_DIR" if chosen else "XDG_CACHE_HOME",
        )  # fmt: skip
    elif not chosen:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@functools.cache
def _cache_problem(folder: Path) -> str:
    """Returns why programs cannot be kept in `folder`, '' if they can.

    Removes what a killed process left there: JAX writes a program, then its time, and where one of
    them is missing it would never write again.
    """
    if files.is_special(folder):
        return f"JAX takes {folder} for a pattern"
    if not files.make_folder(folder):
        return f"{folder} cannot be written"
    try:
        with files.open_lock(folder / ".lockfile") as file:  # JAX's own
            if not files.lock(file):
                return f"the file system of {folder} keeps no locks"
            for path in folder.glob("*-*"):
                stem, _, kind = path.name.rpartition("-")
                other = {"cache": "atime", "atime": "cache"}.get(kind)
                if other and not (path.stat().st_size and (folder / f"{stem}-{other}").exists()):
                    path.unlink()
    except BlockingIOError:
        pass  # another process is at work there
    except OSError as error:
        return one_line(error)
    return ""


def cache_folder() -> Path | None:
    """Returns the folder of compiled programs in the user's caches; None without a home."""
    caches = files.user_caches()
    return caches and caches / "histo_jax" / "compiled"
