"""Notices that the machine is about to be taken away.

SIGTERM is what spot machines, Kubernetes and SLURM send; SIGUSR1 what `sbatch --signal=USR1@120`
sends beforehand. The first is remembered until the work comes to a point where it can stop; the
second leaves at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start me again
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

Item = TypeVar("Item")

_received = False


class Preempted(SystemExit):
    """Leaves the process with status 75; whatever was begun goes on at the next start."""

    def __init__(self, message: str = "preempted; the same command goes on from here") -> None:
        super().__init__(EXIT_STATUS)
        self.message = message

    def __str__(self) -> str:
        return self.message


def _handle(number: int, frame: Any) -> None:
    # An exception from here could come up, and be lost, anywhere: in a callback of the garbage
    # collector, in the middle of a save.
    global _received
    if _received:
        os._exit(128 + number)
    _received = True


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Remembers the signals until the end; inside itself, or in another thread, does nothing."""
    global _received
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(_SIGNALS[0]) is _handle:
        yield
        return
    _received = False
    before = {number: signal.signal(number, _handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requested() -> bool:
    """Tells whether a signal has come."""
    return _received


def stopping(items: Iterable[Item]) -> Iterator[Item]:
    """Passes the items on, and raises `Preempted` between two of them once a signal has come."""
    for item in items:
        if _received:
            raise Preempted
        yield item
