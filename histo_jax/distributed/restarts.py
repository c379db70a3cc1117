"""Counts restarts after a lost process, so that a failure that repeats is not retried for ever.

A command that loses another process exits with status 75, and SLURM or Kubernetes restart it. An
error of the program itself can look the same: after `MAX_RESTARTS` restarts without a new
checkpoint the status is 1.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax

from histo_jax.distributed import processes
from histo_jax.errors import one_line
from histo_jax.run.signals import EXIT_STATUS
from histo_jax.run.workdir import Workdir

MAX_RESTARTS = 3
_FAILURE = 1
# Keys of `status.json`.
_COUNT, _STEP, _LOST = "restarts_without_progress", "step_at_restart", "lost_process"


@contextlib.contextmanager
def track(run: Workdir) -> Iterator[None]:
    """Counts this start of a command as a restart if the last one lost a process.

    Only with several processes. Errors inside are recorded in `status.json` if they come from a
    lost process.

    Args:
        run: in a session.
    """
    if jax.process_count() == 1:
        yield
        return
    status = run.status()
    if status:  # otherwise this is the first start
        _count_start(run)
    try:
        yield
    except Exception as error:
        if processes.is_process_loss(error) and run.status():
            # The error itself matters more than a status that cannot be written.
            with contextlib.suppress(OSError):
                run.update_status(**{_LOST: True})
        raise


def _count_start(run: Workdir) -> None:
    status, newest = run.status(), _newest_step(run.path)
    was_lost = run.previous_state == "running" or status.get(_LOST, False)
    restarts = status.get(_COUNT, 0)
    if newest != status.get(_STEP) or restarts >= MAX_RESTARTS:
        restarts = 0
    elif was_lost:
        restarts += 1
    run.update_status(**{_COUNT: restarts, _STEP: newest, _LOST: False})


def exit_after_loss(error: Exception, workdir: Path) -> NoReturn:
    """Ends the process after the error of a lost process, with one line.

    Args:
        error: see `processes.is_process_loss`.
        workdir: folder of the run.
    """
    status = exit_status(workdir)
    advice = (
        "restart all processes to resume from the newest checkpoint"
        if status == EXIT_STATUS
        else f"{MAX_RESTARTS} restarts made no new checkpoint, so this is probably not a lost "
        "machine: fix the error, then restart all processes"
    )
    print(
        "histo_jax: another process of the run was lost or failed, see its messages; "
        f"{advice} ({one_line(error)})",
        file=sys.stderr,
        flush=True,
    )
    # At once: threads that wait for the lost process would never end.
    os._exit(status)


def exit_status(workdir: Path) -> int:
    """Returns the status for a command that lost a process: 75, or 1 after too many restarts."""
    status = Workdir(workdir).status()
    has_progress = _newest_step(workdir) != status.get(_STEP)
    is_final = status.get(_COUNT, 0) >= MAX_RESTARTS and not has_progress
    return _FAILURE if is_final else EXIT_STATUS


def _newest_step(workdir: Path) -> int | None:
    names = (path.name for path in (workdir / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=None)
