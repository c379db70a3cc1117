"""Standard streams that may be missing, full, or closed by their reader."""

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
        error: the first failure to write other than that the reader has gone.
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
    """Replaces the standard streams of this process, so that a lost log cannot end a run.

    Missing streams discard their output, writing never fails, and characters that the encoding
    lacks are escaped. For programs, not for libraries.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest free number. Otherwise the next file opened would take it, and
            # output to this stream would end up in that file.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    is_unbuffered = getattr(sys.stdout, "write_through", False)
    sys.stdout = _robust(1, sys.stdout, by_line=is_unbuffered or os.isatty(1))
    sys.stderr = _robust(2, sys.stderr, by_line=True)


def log_to_stderr() -> None:
    """Logs this package's messages to stderr as plain lines; for programs."""
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
    """Flushes stdout; returns the error if any output was lost."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Output) else None


def write_stderr(text: bytes) -> None:
    """Writes unbuffered, for signal handlers, which may interrupt another write."""
    with contextlib.suppress(OSError):
        os.write(2, text)
