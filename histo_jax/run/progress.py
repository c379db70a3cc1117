"""Progress: a bar on a terminal or in a notebook, regular lines in a log."""

import contextlib
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

from histo_jax import environment
from histo_jax.errors import UserError, one_line

log = logging.getLogger("histo_jax")

# Between two lines of a log.
LOG_SECONDS = 30.0

Item = TypeVar("Item")


@runtime_checkable
class Bar(Protocol):
    """The interface that `tqdm` and `LogLines` share."""

    def update(self, n: int = 1) -> Any:
        """Counts `n` more items as done."""


class _Active(threading.local):
    """The tasks of a thread, the outermost first."""

    def __init__(self) -> None:
        self.lines: list[LogLines] = []


_active = _Active()


class LogLines:
    """Logs a line every `LOG_SECONDS`, even while nothing is counted; used like `tqdm`.

    A thread logs, so that a compilation or a slow disk does not look like a hanging process. Of
    nested tasks only the innermost is logged.
    """

    def __init__(
        self, desc: str = "", total: int | None = None, unit: str = "", initial: int = 0
    ) -> None:
        self._desc, self._total, self._unit = desc, total, unit.strip()
        self._first = self._done = initial
        self._values: dict[str, Any] = {}
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._stack: list[LogLines] = []

    def __enter__(self) -> "LogLines":
        self._stack = _active.lines
        self._stack.append(self)
        if self._stack[0] is self:
            threading.Thread(target=self._log, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self in self._stack:  # and nested ones that were not closed
            del self._stack[self._stack.index(self) :]

    def update(self, n: int = 1) -> None:
        """Counts `n` more items as done."""
        self._done += n

    def set_postfix(self, *, refresh: bool = True, **values: Any) -> None:
        """Sets the values that are logged after the count."""
        self._values = values

    def _log(self) -> None:
        while not self._ended.wait(LOG_SECONDS):
            with contextlib.suppress(IndexError):  # it has just ended
                log.info("%s", self._stack[-1])

    def __str__(self) -> str:
        seconds, counted = time.monotonic() - self._began, self._done - self._first
        parts = [f"{name} {value}" for name, value in self._values.items()]
        if self._total or counted:
            of = f" of {self._total:,}" if self._total else ""
            parts.insert(0, f"{self._done:,}{of} {self._unit}")
        if counted:
            parts.append(f"{counted / seconds:,.0f} {self._unit}/s")
        return f"{self._desc}: {', '.join([*parts, f'{seconds:.0f} s'])}"


def bar(desc: str, total: int | None = None, *, is_shown: bool = True, **options: Any) -> Any:
    """Returns a progress bar, a context manager with `update`.

    It is one of `tqdm` on a terminal and in a notebook, else `LogLines`. CI shows no bar.

    Args:
        desc: name of the task.
        total: number of items; None = not known.
        is_shown: false shows nothing.
        options: of `tqdm`; `LogLines` uses `unit` and `initial`.
    """
    if is_shown and not _is_live():
        return LogLines(desc, total, options.get("unit", ""), options.get("initial", 0))
    make = _notebook_tqdm() if _is_notebook() else tqdm
    is_hidden = not is_shown or bool(os.environ.get("CI"))
    try:
        made = make(desc=desc, total=total, disable=is_hidden, **options)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        variables = environment.variables("TQDM_")
        raise UserError(
            f"the progress bar cannot be shown ({one_line(error)}): correct or unset {variables}"
        ) from None
    if not made.disable and hasattr(made, "_time"):
        # tqdm counts by the time of day: a clock that is set back would stop the bar.
        made._time, made.start_t, made.last_print_t = time.monotonic, *[time.monotonic()] * 2
    return made


@contextlib.contextmanager
def working(desc: str) -> Iterator[None]:
    """Logs a line every `LOG_SECONDS` while nothing inside is counted; nothing on a terminal."""
    with contextlib.nullcontext() if _is_live() else LogLines(desc):
        yield


def counted(
    bar: Bar, items: Iterable[Item], size: int = 1, total: int = sys.maxsize
) -> Iterator[Item]:
    """Yields the items, and counts each as `size` when the next is requested.

    Counts `total` at most: the last batch may be padded.
    """
    for item in items:
        yield item
        size = min(size, total)
        bar.update(size)
        total -= size


def _is_live() -> bool:
    """Returns whether a bar can be redrawn."""
    return _is_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def _is_notebook() -> bool:
    """Returns whether this is a kernel of Jupyter, Colab or Kaggle, not a console of IPython."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython and get_ipython()
    return "IPKernelApp" in getattr(shell, "config", {})


def _notebook_tqdm() -> Any:
    """Returns tqdm with widgets, or with text where ipywidgets is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where ipywidgets is missing
        from tqdm.auto import tqdm as auto
    return auto
