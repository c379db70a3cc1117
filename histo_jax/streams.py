"""Standard streams that may be missing, full, or closed by whoever reads them."""

import contextlib
import errno
import io
import logging
import os
import sys
from typing import Any, TextIO

# The reader of a pipe or a terminal has gone.
_GONE = (errno.EPIPE, errno.EIO)


class _Output(io.FileIO):
    """A standard stream whose reader may go away, which is no failure."""

    def __init__(self, number: int, label: str, must_arrive: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._label, self._must_arrive = label, must_arrive

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self._must_arrive and error.errno not in _GONE:
                self._must_arrive = False  # once: Python writes the rest again at its end
                raise OSError(error.errno, error.strerror, self._label) from None
            return memoryview(data).nbytes


def make_robust() -> None:
    """Replaces the standard streams of this process; for programs, not for use as a library.

    Missing ones lead nowhere. What is written to stderr never fails; what is written to stdout
    fails where it is lost, with `OSError`, but not where the reader has gone. Characters that
    the encoding lacks are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest free number. Otherwise the next file that is opened would, and
            # whatever writes to this stream would write into that file.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _robust(1, "<stdout>", sys.stdout, must_arrive=True)
    sys.stderr = _robust(2, "<stderr>", sys.stderr, must_arrive=False)
    for handler in logging.getLogger("histo_jax").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def _robust(number: int, label: str, stream: TextIO | None, must_arrive: bool) -> io.TextIOWrapper:
    is_buffered = must_arrive and not getattr(stream, "write_through", False)
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(number, label, must_arrive)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=not is_buffered or os.isatty(number),
    )


def flush_stdout() -> OSError | None:
    """Writes what is left for stdout; returns the error where that is lost."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def write_stderr(text: bytes) -> None:
    """Writes at once, as signal handlers must: they may interrupt another write."""
    with contextlib.suppress(OSError):
        os.write(2, text)
