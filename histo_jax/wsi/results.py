"""The folder of one slide's results: complete or absent, and known by what it was made from."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from histo_jax.errors import UserError
from histo_jax.run import files

SUMMARY = "slide.json"
FAILURES = ".failed"
# Of `slide.json`; results of another one are made again.
FORMAT = 1
_REQUIRED = {"format", "slide", "inputs"}


@contextlib.contextmanager
def locked(parent: Path) -> Iterator[None]:
    """Keeps other commands out of the folder of all results.

    Raises:
        UserError: another one works there.
    """
    # The folder itself: a file that is removed at the end would not keep out who has it open.
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks of folders
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{parent} is in use by another heatmap command: wait for it, or choose "
                    "another folder"
                ) from None
        yield
    finally:
        os.close(descriptor)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Returns what `slide.json` holds, None if it is missing, corrupt or of another format."""
    try:
        values = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(values, dict) and values.keys() >= _REQUIRED
    return values if is_whole and values["format"] == FORMAT else None


def read_all(parent: Path) -> dict[str, dict[str, Any]]:
    """Returns the summary of each slide that has results, by name."""
    summaries = {path.name: read_summary(path) for path in sorted(parent.glob("[!.]*"))}
    return {name: summary for name, summary in summaries.items() if summary}


def record_failure(
    parent: Path, name: str, slide: Path, reason: str, traceback: str | None = None
) -> None:
    """Keeps the reason why a slide failed, for the page; processes share the folder.

    Args:
        parent: folder of all results.
        name: of the slide's results.
        slide: its file.
        reason: one line.
        traceback: of an error that nothing expects; None = the reason says all.
    """
    (parent / FAILURES).mkdir(parents=True, exist_ok=True)
    values = {"name": name, "slide": str(slide), "reason": reason, "traceback": traceback}
    files.write_json(failure_file(parent, name), values)


def failure_file(parent: Path, name: str) -> Path:
    """Returns where `record_failure` keeps the reason."""
    return parent / FAILURES / f"{name}.json"


def forget_failures(parent: Path) -> None:
    """Removes what `record_failure` kept: the page shows the failures of the last command."""
    shutil.rmtree(parent / FAILURES, ignore_errors=True)


def read_failures(parent: Path) -> list[dict[str, Any]]:
    """Returns the failures, by name."""
    failures = []
    for path in sorted((parent / FAILURES).glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            failures.append(json.loads(path.read_text(encoding="utf-8")))
    return failures
