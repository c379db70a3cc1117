"""Sets up JAX for a command: default options, a compilation cache, and memory allocation."""

import contextlib
import functools
import importlib.metadata
import logging
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

from histo_jax import environment, malloc
from histo_jax.distributed import processes
from histo_jax.errors import UserError, one_line
from histo_jax.run import files
from histo_jax.version import VERSION

log = logging.getLogger("histo_jax")

_CACHE_BYTES = 2**30
_PACKAGES = ("jax", "flax", "optax", "numpy")
# Defaults of options that change results or stop a run; each is a context manager of `jax`.
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
    """Returns the versions that results depend on: Python, packages, devices."""
    devices, packages = jax.devices(), dict.fromkeys(_PACKAGES, "unknown")
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "histo_jax": VERSION,
        **packages,
        "devices": f"{len(devices)} {devices[0].device_kind}",
    }


@contextlib.contextmanager
def jax_defaults() -> Iterator[None]:
    """Runs the body with JAX's default configuration, in this thread.

    Raises:
        UserError: an option without a context manager is not at its default; names its variable.
    """
    for option, default in _REFUSED.items():
        value = jax.config.values.get(option, default)
        if value != default:
            raise UserError(
                f"{option.upper()}={value} changes the results: unset it, or set it to {default}"
            )
    with contextlib.ExitStack() as stack:
        for name, value in _PINNED.items():
            if hasattr(jax, name):  # not every version of JAX has all of them
                stack.enter_context(getattr(jax, name)(value))
        yield


def set_up() -> None:
    """Sets up devices, log, compilation cache and, on CPU, memory allocation.

    Compiled programs are cached in the folder that `JAX_COMPILATION_CACHE_DIR` or
    `jax_compilation_cache_dir` names, by default in the user's cache folder.

    Raises:
        UserError: JAX finds no device; names the variables that select it.
    """
    check_devices()
    processes.assign_roles()
    _set_up_cache()
    if jax.default_backend() == "cpu":
        # Every step allocates hundreds of megabytes. If they are returned to the system after it,
        # the next step gets them page by page: measured, that took a quarter of a step.
        malloc.keep_freed()
        malloc.use_one_arena()


def check_devices() -> None:
    """Initialises JAX's devices.

    Raises:
        UserError: there is none; names the variables that select it.
    """
    try:
        jax.devices()
    except Exception as error:  # plug-ins may raise anything
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
        log.warning("compiled programs are not cached: there is no home folder; set XDG_CACHE_HOME")
    elif problem := _cache_problem(folder, evicts=not chosen or _evicts()):
        jax.config.update("jax_compilation_cache_dir", None)
        log.warning(
            "compiled programs are not cached: %s; set %s to another folder",
            problem, "JAX_COMPILATION_CACHE_DIR" if chosen else "XDG_CACHE_HOME",
        )  # fmt: skip
    elif not chosen:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _evicts() -> bool:
    """Returns whether JAX limits the size of the cache; only then it keeps access times."""
    return jax.config.values["jax_compilation_cache_max_size"] != -1


@functools.cache
def _cache_problem(folder: Path, evicts: bool) -> str:
    """Returns why `folder` cannot hold compiled programs, '' if it can.

    Removes what a killed process left there, as JAX would never replace it: an empty program and,
    where JAX evicts old programs, one whose access time, which JAX writes after it, is missing.
    """
    if files.is_special(folder):
        return f"JAX would treat {folder} as a pattern"
    if not files.make_folder(folder):
        return f"{folder} cannot be written"
    try:
        with files.open_lock(folder / ".lockfile") as file:  # JAX's own
            if not files.lock(file):
                return f"the file system of {folder} has no locks"
            for path in folder.glob("*-*"):
                stem, _, kind = path.name.rpartition("-")
                other = {"cache": "atime", "atime": "cache"}.get(kind)
                alone = evicts and not (folder / f"{stem}-{other}").exists()
                if other and (alone or not path.stat().st_size):
                    path.unlink()
    except BlockingIOError:
        pass  # another process uses it
    except OSError as error:
        return one_line(error)
    return ""


def cache_folder() -> Path | None:
    """Returns the default folder of compiled programs; None if the user has no home folder."""
    caches = files.user_caches()
    return caches and caches / "histo_jax" / "compiled"
