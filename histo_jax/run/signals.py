"""Notices that the machine is about to be taken away, or that somebody wants to stop.

SIGTERM is what spot machines, Kubernetes and SLURM send; SIGUSR1 what `sbatch --signal=USR1@120`
sends beforehand; SIGHUP comes when the terminal is closed; SIGINT is Ctrl-C, or a notebook's
interrupt. The first is remembered until the work comes to a point where it can stop; the second
leaves at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from histo_jax import streams

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start me again
_INTERRUPTED = 130  # as shells have it: 128 + SIGINT
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

Item = TypeVar("Item")

_received = 0  # the signal's number


class Preempted(SystemExit):
    """Leaves the process with status 75, or 130 after Ctrl-C; the next start goes on from here."""

    def __init__(self, where: str = "") -> None:
        interrupted = _received == signal.SIGINT
        super().__init__(_INTERRUPTED if interrupted else EXIT_STATUS)
        word = "interrupted" if interrupted else "preempted"
        self.message = f"{word}{where}; the same command goes on from here"

    def __str__(self) -> str:
        return self.message


def _handle(number: int, frame: Any) -> None:
    # An exception from here could come up, and be lost, anywhere: in JAX's callback of the garbage
    # collector, in the middle of a save.
    global _received
    if _received and number != signal.SIGHUP:  # which a closed terminal's shell sends once more
        os._exit(128 + number)
    _received = _received or number
    if number == signal.SIGINT:
        streams.write_stderr(
            b"\nhisto_jax: stopping as soon as possible; Ctrl-C again leaves at once\n"
        )


def _handle_interrupt(number: int, frame: Any) -> None:
    """Handles SIGINT where Python's own handler would raise KeyboardInterrupt."""
    if _received == number:
        raise KeyboardInterrupt
    _handle(number, frame)


def _leave_at_the_second(pipe: int, numbers: Iterable[int]) -> None:
    # In a thread: Python calls `_handle` between two of its own instructions, and a compilation
    # or a device that hangs keeps the main thread from its next one.
    is_asked = False
    while number := os.read(pipe, 1):
        if is_asked and number[0] in numbers and number[0] != signal.SIGHUP:
            os._exit(128 + number[0])
        is_asked |= number[0] in numbers
    os.close(pipe)


@contextlib.contextmanager
def watch(ctrl_c: bool = False) -> Iterator[None]:
    """Remembers the signals until the end; inside itself, or in another thread, does nothing.

    Args:
        ctrl_c: treat SIGINT as the others. Otherwise it ends in KeyboardInterrupt, once the work
            has come to a point where it can stop, so that no notebook loses it; a handler that is
            not Python's own is left alone.

    Raises:
        KeyboardInterrupt: SIGINT came, and `ctrl_c` is false.
    """
    global _received
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(_SIGNALS[0]) is _handle:
        yield
        return
    # What `nohup` has set to be ignored stays so.
    numbers = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    numbers += [signal.SIGINT] * ctrl_c
    pipe, signalled = os.pipe()
    os.set_blocking(signalled, False)
    wakeup = signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    threading.Thread(target=_leave_at_the_second, args=(pipe, numbers), daemon=True).start()
    before = {number: signal.signal(number, _handle) for number in numbers}
    if not ctrl_c and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _handle_interrupt)
    try:
        yield
        if _received == signal.SIGINT and not ctrl_c:
            raise KeyboardInterrupt("interrupted when all was done")
    except Preempted as error:
        if error.code == _INTERRUPTED and not ctrl_c:
            raise KeyboardInterrupt(str(error)) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(signalled)
        _received = 0


def requested() -> bool:
    """Tells whether a signal has come."""
    return bool(_received)


def stopping(items: Iterable[Item]) -> Iterator[Item]:
    """Passes the items on, and raises `Preempted` between two of them once a signal has come."""
    for item in items:
        if _received:
            raise Preempted
        yield item
