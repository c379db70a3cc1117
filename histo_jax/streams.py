"""Standard streams that may be missing, full, or closed by whoever reads them."""

import contextlib
import errno
import io
import logging
import os
import sys
from typing import Any, TextIO


class _Output(io.FileIO):
    """A standard stream that never fails.

    Attributes:
        error: the first time that something could not be written though somebody may read it.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # the reader, or the terminal, has gone
                self.error = self.error or error
            return memoryview(data).nbytes


def make_robust() -> None:
    """Replaces the standard streams of this process; for programs, not for use as a library.

    Missing ones lead nowhere, writing never fails, and characters that the encoding lacks are
    escaped: a lost log must not end a run.
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
    is_unbuffered = getattr(sys.stdout, "write_through", False)
    sys.stdout = _robust(1, sys.stdout, by_line=is_unbuffered or os.isatty(1))
    sys.stderr = _robust(2, sys.stderr, by_line=True)


def log_to_stderr() -> None:
    """Shows what this package logs, from INFO on, as plain lines; for programs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("histo_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _robust(number: int, stream: TextIO | None, by_line: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(number, "w", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=by_line,
    )


def flush_stdout() -> OSError | None:
    """Writes what is left for stdout; returns the error where any of it was lost."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Output) else None


def write_stderr(text: bytes) -> None:
    """Writes at once, as signal handlers must: they may interrupt another write."""
    with contextlib.suppress(OSError):
        os.write(2, text)
