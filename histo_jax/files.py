"""Files that are either the old one or the new one, never a part."""

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from histo_jax.errors import ExpectedError

_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE,
)  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary name beside `path`, then renames it to `path`.

    Raises:
        OSError: the folder cannot be written or the disk is full; `path` is as it was.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes `values` as indented JSON; see `write_text`. Not-a-number becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and value != value else value

    write_text(path, json.dumps(finite(values), indent=2, allow_nan=False) + "\n")


def nearest(path: Path) -> Path:
    """Returns `path`, or what is there of the folders above it."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a library's own error about a full or forbidden disk into the system's `OSError`.

    TensorStore and ArrayRecord raise ValueError and RuntimeError with the system's words in them.
    The error names `folder`, unless theirs quotes a file that lies elsewhere.
    """
    try:
        yield
    except (OSError, ExpectedError):
        raise
    except Exception as error:
        quoted = re.search(r"""["'](/[^"']+)["']""", str(error))
        place = str(folder)
        if quoted and not Path(quoted[1]).is_relative_to(folder.absolute()):
            place = quoted[1]
        for number in _DISK:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), place) from error
        raise
