"""Files that are either the old one or the new one, never a part."""

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes `text` to a temporary name beside `path`, then renames it to `path`.

    Raises:
        OSError: the folder cannot be written or the disk is full; `path` is as it was.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes `values` as indented JSON; see `write_text`. Not-a-number becomes null."""
    finite = {
        key: None if isinstance(value, float) and value != value else value
        for key, value in values.items()
    }
    write_text(path, json.dumps(finite, indent=2, allow_nan=False) + "\n")
