"""Runs a script of this package in a process of its own, which cannot import the package."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from histo_jax.run import signals

_FOLDER = Path(__file__).parent
_POLL_SECONDS = 0.2


class ProcessError(Exception):
    """The process failed; the message is the last line that it wrote."""


def run(script: str, *arguments: object) -> None:
    """Runs a script and waits for it.

    Args:
        script: name of its file, in the folder of this module.
        arguments: of the script.

    Raises:
        ProcessError: it failed.
        Preempted: a signal was received; the process is killed.
    """
    # -P: the folder of the script does not hide packages such as onnx.
    command = [sys.executable, "-P", str(_FOLDER / script), *map(str, arguments)]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        # Ctrl-C reaches all processes of a terminal's group: it would look like a failure.
        start_new_session=True,
    ) as process:
        try:
            stderr = _wait(process)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        lines = stderr.strip().splitlines() or [f"status {process.returncode}"]
        raise ProcessError(lines[-1])


def _wait(process: subprocess.Popen[str]) -> str:
    """Returns what a process has written when it ends."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_POLL_SECONDS)[1]
        if signals.requested():
            raise signals.Preempted(" before the export was complete")
