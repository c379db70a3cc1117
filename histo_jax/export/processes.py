"""Runs a script of this package in a process of its own, which cannot import the package."""

import os
import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).parent


class ProcessError(Exception):
    """The process failed; the message is the last line that it wrote."""


def run(script: str, *arguments: object) -> None:
    """Runs a script and waits for it.

    Args:
        script: name of its file, in the folder of this module.
        arguments: of the script.

    Raises:
        ProcessError: it failed.
    """
    # -P: the folder of the script does not hide packages such as onnx.
    command = [sys.executable, "-P", str(_FOLDER / script), *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ProcessError(lines[-1])
