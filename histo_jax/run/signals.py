"""Stops a command cleanly when the machine is preempted or the user interrupts it.

SIGTERM is what spot machines, Kubernetes and SLURM send; SIGUSR1 what `sbatch --signal=USR1@120`
sends beforehand; SIGHUP comes when the terminal is closed; SIGINT is Ctrl-C, or a notebook's
interrupt. The first signal is recorded until the command reaches a point where it can stop; the
second exits at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from histo_jax import streams

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: rerun the command
_INTERRUPTED = 130  # as shells have it: 128 + SIGINT
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

Item = TypeVar("Item")

_received = 0  # the signal's number


class Preempted(SystemExit):
    """Exits with status 75, or 130 after Ctrl-C; the next start resumes.

    Args:
        where: what was saved, for the message, as in ', saved at step 7'.
    """

    def __init__(self, where: str = "") -> None:
        interrupted = _received == signal.SIGINT
        super().__init__(_INTERRUPTED if interrupted else EXIT_STATUS)
        word = "interrupted" if interrupted else "preempted"
        self.message = f"{word}{where}; rerun the command to resume"

    def __str__(self) -> str:
        return self.message


def _handle(number: int, frame: Any) -> None:
    # An exception raised here could surface, and be lost, anywhere: in a garbage collector callback
    # of JAX, in the middle of a save.
    global _received
    if _received and number != signal.SIGHUP:  # which the shell of a closed terminal sends twice
        os._exit(128 + number)
    _received = _received or number
    if number == signal.SIGINT:
        streams.write_stderr(
            b"\nhisto_jax: stopping as soon as possible; press Ctrl-C again to exit at once\n"
        )


def _handle_interrupt(number: int, frame: Any) -> None:
    """Handles SIGINT where Python's own handler would raise KeyboardInterrupt."""
    if _received == number:
        raise KeyboardInterrupt
    _handle(number, frame)


def _exit_at_second_signal(pipe: int, numbers: Iterable[int]) -> None:
    # In a thread: Python calls `_handle` between two of its instructions, and a compilation or a
    # device that hangs keeps the main thread from the next one.
    has_first = False
    while number := os.read(pipe, 1):
        if has_first and number[0] in numbers and number[0] != signal.SIGHUP:
            os._exit(128 + number[0])
        has_first |= number[0] in numbers
    os.close(pipe)


@contextlib.contextmanager
def watch(ctrl_c: bool = False) -> Iterator[None]:
    """Records signals until the end; nested calls, and those in other threads, do nothing.

    Args:
        ctrl_c: treat SIGINT like the others. Otherwise it raises KeyboardInterrupt at a point where
            the command can stop, so that a notebook keeps its work; a handler other than Python's
            own is kept.

    Raises:
        KeyboardInterrupt: SIGINT was received, and `ctrl_c` is false.
    """
    global _received
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(_SIGNALS[0]) is _handle:
        yield
        return
    # Signals that `nohup` ignores stay ignored.
    numbers = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    numbers += [signal.SIGINT] * ctrl_c
    pipe, signalled = os.pipe()
    os.set_blocking(signalled, False)
    wakeup = signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    threading.Thread(target=_exit_at_second_signal, args=(pipe, numbers), daemon=True).start()
    before = {number: signal.signal(number, _handle) for number in numbers}
    if not ctrl_c and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _handle_interrupt)
    try:
        yield
        if _received == signal.SIGINT and not ctrl_c:
            raise KeyboardInterrupt("interrupted after the command had finished")
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
    """Returns whether a signal was received."""
    return bool(_received)


def stopping(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items; raises `Preempted` between two of them once a signal was received."""
    for item in items:
        if _received:
            raise Preempted
        yield item
