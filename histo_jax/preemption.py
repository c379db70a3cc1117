"""Notices that the machine is about to be taken away.

SIGTERM is what spot machines, Kubernetes and SLURM send; SIGUSR1 what `sbatch --signal=USR1@120`
sends beforehand. The first lets the work be saved, the second leaves at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start me again

Item = TypeVar("Item")

_received = False
_deferred = False


class Preempted(SystemExit):
    """Leaves the process with status 75; whatever was begun goes on at the next start."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_STATUS)
        self.message = message

    def __str__(self) -> str:
        return self.message


def _handle(number: int, frame: Any) -> None:
    global _received
    if _received:
        os._exit(128 + number)
    _received = True
    if not _deferred:
        raise Preempted("preempted; the same command goes on from here")


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Turns the signals into `Preempted`, until the end; does nothing outside the main thread."""
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received = False
    before = {number: signal.signal(number, _handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Puts the signals off until `requested` is asked, so that a save can come first."""
    global _deferred
    with contextlib.nullcontext() if _is_watching() else watch():
        before, _deferred = _deferred, True
        try:
            yield
        finally:
            _deferred = before


def _is_watching() -> bool:
    return signal.getsignal(_SIGNALS[0]) is _handle


def requested() -> bool:
    """Tells whether a signal has come."""
    return _received


def stopping(items: Iterable[Item]) -> Iterator[Item]:
    """Passes the items on and raises `Preempted` between two of them once a signal has come."""
    for item in items:
        if _received:
            raise Preempted("preempted; the same command goes on from here")
        yield item
