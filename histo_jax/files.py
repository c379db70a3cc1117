"""Files that are either the old one or the new one, never a part."""

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from histo_jax.errors import ExpectedError


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


def expand(path: str | os.PathLike[str], setting: str) -> Path:
    """Returns `path` with the home folder in place of `~`.

    Raises:
        ExpectedError: that user has no home folder; names the setting.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ExpectedError(
            f"{setting}={path}: there is no such home folder; give the whole path"
        ) from None


def user_caches() -> Path | None:
    """Returns the user's folder of caches; None without XDG_CACHE_HOME and a home folder."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():  # the specification says to ignore relative ones
        return named
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def make_folder(folder: Path) -> bool:
    """Makes a folder where it is missing; returns whether files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a library's own error about a full or forbidden disk into the system's `OSError`.

    TensorStore and ArrayRecord raise ValueError and RuntimeError with the system's words in them.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(folder)) from error
        raise


def fingerprints(paths: Iterable[Path]) -> tuple[str, str]:
    """Returns two SHA-256 of files: of names, sizes and what CSVs hold; of names and times.

    Only CSVs are opened; the second tells that a file was changed without changing its size.
    """
    content, times = hashlib.sha256(), hashlib.sha256()
    for path in paths:
        status = path.stat()
        content.update(f"{path.name} {status.st_size}\n".encode())
        times.update(f"{path.name} {status.st_mtime_ns}\n".encode())
        if path.suffix == ".csv":
            content.update(path.read_bytes())
    return content.hexdigest(), times.hexdigest()
