"""The folder of one slide's results: complete or absent, and known by what it was made from."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from histo_jax.run import files

SUMMARY = "slide.json"
FAILURES = ".failed"
# Of `slide.json`; results of another one are made again.
FORMAT = 1


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Returns what `slide.json` holds, None if it is missing, corrupt or of another format."""
    try:
        values = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and values.get("format") == FORMAT else None


def read_all(parent: Path) -> dict[str, dict[str, Any]]:
    """Returns the summary of each slide that has results, by name."""
    summaries = {path.name: read_summary(path) for path in sorted(parent.glob("[!.]*"))}
    return {name: summary for name, summary in summaries.items() if summary}


def record_failure(parent: Path, name: str, slide: Path, reason: str) -> None:
    """Keeps the reason why a slide failed, for the page; processes share the folder."""
    (parent / FAILURES).mkdir(parents=True, exist_ok=True)
    values = {"name": name, "slide": str(slide), "reason": reason}
    files.write_json(parent / FAILURES / f"{name}.json", values)


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
