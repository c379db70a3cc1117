"""Runs commands with default settings of all libraries, whatever the environment sets."""

import contextlib
import functools
import importlib
import logging
import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterator

from absl import logging as absl_logging

from histo_jax.errors import UserError, one_line

# Options that change how CSVs are parsed or written, or how a table is printed.
_PANDAS_OPTIONS = (
    "display.chop_threshold", "display.colheader_justify", "display.float_format",
    "display.max_colwidth", "display.multi_sparse", "display.precision",
    "display.show_dimensions", "display.unicode.east_asian_width", "display.width",
    "future.distinguish_nan_and_na", "future.infer_string", "future.python_scalars",
    "mode.string_storage",
)  # fmt: skip
_HOST_DEVICES = "--xla_force_host_platform_device_count="


# As `extra` of a log record: it is logged once per command, as warnings are.
ONCE = {"is_once": True}


class _OncePerCommand(logging.Filter):
    """Drops a warning, or a record with `ONCE`, that was logged already."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING and not getattr(record, "is_once", False):
            return True
        message = record.getMessage()
        is_new = message not in self._logged
        self._logged.add(message)
        return is_new


class _SharedDefaults:
    """Process-wide settings have their defaults while any thread is inside, then are restored.

    Counted, so that two threads whose commands overlap do not restore each other's defaults.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1
            if self._count == 1:
                self._apply(self._restore)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._restore.close()

    @staticmethod
    def _apply(stack: contextlib.ExitStack) -> None:
        import pandas as pd
        from PIL import Image

        stack.enter_context(warnings.catch_warnings())
        reset_warnings()
        # Orbax, Grain and TFDS log through absl, with tracebacks for what they raise anyway.
        stack.callback(absl_logging.set_verbosity, absl_logging.get_verbosity())
        absl_logging.set_verbosity(absl_logging.FATAL)
        for option in _PANDAS_OPTIONS:
            with contextlib.suppress(pd.errors.OptionError):  # other versions have other options
                stack.callback(pd.set_option, option, pd.get_option(option))
                pd.reset_option(option)
        # The user's limit may be smaller than a patch.
        stack.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
        logger, once = logging.getLogger("histo_jax"), _OncePerCommand()
        logger.addFilter(once)
        stack.callback(logger.removeFilter, once)


_shared_defaults = _SharedDefaults()


def reset_warnings() -> None:
    """Sets Python's initial warning filters: no warning becomes an error."""
    warnings.resetwarnings()
    warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
    for category in (
        DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning,
    ):  # fmt: skip
        warnings.simplefilter("ignore", category, append=True)
    # scikit-learn imports joblib, which misses shared memory in some containers; nothing needs it.
    warnings.filterwarnings("ignore", message=".*joblib will operate in serial mode")


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    """Sets Python's warnings, absl's log, NumPy, pandas and Pillow to defaults, until the end.

    A warning of histo_jax is logged once. For JAX see `distributed.runtime.jax_defaults`.
    """
    import numpy as np

    with (
        _shared_defaults,
        np.printoptions(legacy=False, precision=8, floatmode="maxprec"),  # also to_csv() reads it
        np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"),
    ):
        yield


@contextlib.contextmanager
def _root_logger_unchanged() -> Iterator[None]:
    """Removes the handler that Orbax adds when it is imported: it is the program's to add one."""
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)


def load(module: str) -> types.ModuleType:
    """Imports a module that imports JAX and tqdm.

    Raises:
        UserError: an environment variable makes the import of a library fail, or would abort the
            process; names the variable.
    """
    _check_xla_flags(os.environ.get("XLA_FLAGS", "").strip())
    with defaults(), _root_logger_unchanged():
        for library, prefix in (("jax", "JAX_"), ("tqdm", "TQDM_")):
            try:
                importlib.import_module(library)
            except (ValueError, AttributeError) as error:
                raise UserError(
                    f"{library} cannot be imported ({one_line(error)}): correct or unset "
                    f"{variables(prefix)}"
                ) from None
        return importlib.import_module(module)


def variables(*prefixes: str) -> str:
    """Returns the environment variables with one of the prefixes, as in 'JAX_PLATFORMS=cpu'."""
    names = sorted(name for name in os.environ if name.startswith(prefixes))
    return ", ".join(f"{name}={os.environ[name]}" for name in names) or f"{prefixes[0]}*"


@functools.cache
def _check_xla_flags(flags: str) -> None:
    """Refuses XLA_FLAGS that XLA cannot parse: it would abort the process.

    Raises:
        UserError: names the flag.
    """
    if not flags or flags.removeprefix(_HOST_DEVICES).isdecimal():
        return
    probe = "from jaxlib import xla_client; xla_client.CompileOptions()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", probe],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    fatal = [line for line in done.stderr.splitlines() if "flags" in line.partition("] ")[0]]
    if done.returncode and fatal:
        reason = fatal[0].partition("] ")[2][:200]
        raise UserError(f"XLA_FLAGS={flags}: {reason}; correct or unset XLA_FLAGS")
