"""Atomic writes, locks, paths, and errors of the file system."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import traceback
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from histo_jax.errors import UserError

# Orbax and TFDS treat a folder's name as a pattern; etils treats these folders of the root as
# buckets; TensorStore turns a backslash into `/` and accepts only UTF-8.
_SPECIAL = re.compile(r"[*?\[\]\\\udc80-\udcff]|^/(gs|s3|az|hf)(/|$)|gs:/")
_DESCRIPTORS = Path("/proc/self/fd")
# Bytes of a path; the rest of the system's 4096 is for the files inside the folder.
_LONG, _LONGEST = 3000, 3900
# A full, forbidden or failing disk, or a limit of the process: no file is corrupt because of these.
_NOT_OF_THE_CONTENT = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO,
    errno.ESTALE,
)  # fmt: skip
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8; see `write_bytes`."""
    # The name of a folder, which reports show, may not be UTF-8.
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary name beside `path`, then renames it to `path`.

    Raises:
        OSError: the folder cannot be written or the disk is full; `path` is unchanged.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with naming(path), part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes `values` as indented JSON; see `write_text`. NaN becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and value != value else value

    write_text(path, json.dumps(finite(values), indent=2, allow_nan=False) + "\n")


def nearest(path: Path) -> Path:
    """Returns `path`, or the closest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def expand(path: str | os.PathLike[str], setting: str) -> Path:
    """Returns `path` with the home folder in place of `~`.

    Raises:
        UserError: that user has no home folder; names the setting.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
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
    """Makes a folder if it is missing; returns whether files can be created in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds this path to system errors that name no file, as those of writing."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def check_name(folder: Path, field: str) -> None:
    """Refuses a folder that cannot be used because of its path; changes nothing.

    Raises:
        UserError: names `field` and the fix.
    """
    if len(os.fsencode(folder.absolute())) > _LONGEST:
        raise UserError(f"the path of {field} is longer than {_LONGEST} bytes: choose another")
    if is_special(folder) and not _DESCRIPTORS.exists():
        raise UserError(
            f"{field}={folder} has a character in its path that libraries treat as a pattern "
            "(*, ?, a bracket, a backslash): choose another folder"
        )


def is_special(folder: Path) -> bool:
    """Returns whether a library would misread the absolute path of this folder."""
    path = _absolute(folder)
    return bool(_SPECIAL.search(str(path))) or len(os.fsencode(path)) > _LONG


def _absolute(folder: Path) -> Path:
    # TensorStore reads `link/..` as the folder that contains the link.
    return Path(os.path.realpath(folder)) if ".." in folder.parts else folder.absolute()


class LiteralFolder:
    """A folder under a name that every library takes literally.

    Attributes:
        path: the folder itself, absolute; where `is_special`, another name of it, valid in this
            process for the lifetime of this object.

    Raises:
        OSError: the folder does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.path = _absolute(folder)
        if is_special(self.path):
            # Not a symbolic link: a killed process would leave it behind.
            descriptor = os.open(self.path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
            weakref.finalize(self, os.close, descriptor)
            self.path = _DESCRIPTORS / str(descriptor)


def open_lock(path: Path) -> IO[str]:
    """Opens a file to be locked, creating it if it is missing.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        return path.open("a+", errors="replace")
    except PermissionError:
        if not path.exists():
            raise
        return path.open(errors="replace")  # another user's; reading is enough to lock it


def lock(file: IO[str]) -> bool:
    """Locks an open file until it is closed, however the process ends.

    Returns:
        False where the file system has no locks.

    Raises:
        BlockingIOError: it is locked already.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        with naming(Path(file.name)):
            raise
    return True


def describe(error: OSError, folders: Iterable[Path]) -> str:
    """Returns one line about a system error: the file or what else failed, and the fix.

    Args:
        error: it may name no file.
        folders: where the command writes; checked for a full disk if the error names none.
    """
    message = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{message}: raise the limit (ulimit -n) and rerun the command"
    if isinstance(error.filename, str | bytes | os.PathLike):
        return f"{os.fsdecode(error.filename)}: {message}; fix this and rerun the command"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        places = (nearest(place) for place in (*folders, Path(tempfile.gettempdir())))
        full = [str(p) for p in places if shutil.disk_usage(p).free < 2**20]
        if full:
            disks = ", ".join(dict.fromkeys(full))
            return f"{disks}: {message}; free some space and rerun the command"
    frames = list(traceback.walk_tb(error.__traceback__))
    where = frames[-1][0].f_globals.get("__name__") if frames else "a library"
    return f"{message} (in {where}, which names no file): fix this and rerun the command"


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a library's error about a full or forbidden disk into the system's `OSError`.

    TensorStore and ArrayRecord raise ValueError and RuntimeError with the system's message in them.
    The error names `folder`, unless theirs quotes a file outside it.
    """
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        quoted = re.search(r"""["'](/[^"']+)["']""", str(error))
        place = str(folder)
        if quoted and not Path(quoted[1]).is_relative_to(folder.absolute()):
            place = quoted[1]
        for number in _NOT_OF_THE_CONTENT:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), place) from error
        raise
