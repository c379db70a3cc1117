"""Files that are either the old one or the new one, never a part."""

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

# Orbax and TFDS make a pattern of a folder's name; etils takes these folders of the root for
# buckets; TensorStore makes `/` of a backslash and knows UTF-8 only.
_SPECIAL = re.compile(r"[*?\[\]\\\udc80-\udcff]|^/(gs|s3|az|hf)(/|$)|gs:/")
_DESCRIPTORS = Path("/proc/self/fd")
# Bytes of a path, of the system's 4096: the rest is for what is written inside the folder.
_LONG, _LONGEST = 3000, 3900
# A full, forbidden or failing disk, or a limit of the process: no file is damaged by these.
_NOT_OF_THE_CONTENT = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO,
    errno.ESTALE,
)  # fmt: skip
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8; see `write_bytes`."""
    # The name of a folder, which reports show, may be no UTF-8.
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary name beside `path`, then renames it to `path`.

    Raises:
        OSError: the folder cannot be written or the disk is full; `path` is as it was.
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
    """Makes a folder where it is missing; returns whether files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives the errors of the system that name no file, as those of writing do not, this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def check_name(folder: Path, field: str) -> None:
    """Refuses a folder that cannot be worked in because of its path; changes nothing.

    Raises:
        UserError: names `field`, and the remedy.
    """
    if len(os.fsencode(folder.absolute())) > _LONGEST:
        raise UserError(f"the path of {field} is longer than {_LONGEST} bytes: choose another")
    if is_special(folder) and not _DESCRIPTORS.exists():
        raise UserError(
            f"{field}={folder} has a character in its path that libraries take for a pattern "
            "(*, ?, a bracket, a backslash): choose another folder"
        )


def is_special(folder: Path) -> bool:
    """Whether a library would take the absolute path of this folder for something else."""
    path = _absolute(folder)
    return bool(_SPECIAL.search(str(path))) or len(os.fsencode(path)) > _LONG


def _absolute(folder: Path) -> Path:
    # TensorStore takes `link/..` for the folder that holds the link.
    return Path(os.path.realpath(folder)) if ".." in folder.parts else folder.absolute()


class LiteralFolder:
    """A folder under a name that every library takes as it stands.

    Attributes:
        path: the folder itself, absolute; where `is_special`, another name of it that is valid in
            this process and as long as this object.

    Raises:
        OSError: it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = _absolute(folder)
        if is_special(self.path):
            # No symbolic link: a process that is killed would leave it behind.
            descriptor = os.open(self.path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
            weakref.finalize(self, os.close, descriptor)
            self.path = _DESCRIPTORS / str(descriptor)


def open_lock(path: Path) -> IO[str]:
    """Opens a file that is to be locked, making it if it is missing.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        return path.open("a+", errors="replace")
    except PermissionError:
        if not path.exists():
            raise
        return path.open(errors="replace")  # another user's; to lock it, reading is enough


def lock(file: IO[str]) -> bool:
    """Locks an open file until it is closed, however the process ends.

    Returns:
        False where the file system keeps no locks.

    Raises:
        BlockingIOError: somebody else has locked it.
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
    """Returns one line on an error of the system: the file or what else failed, and the remedy.

    Args:
        error: it may name no file.
        folders: in which the command writes; of a full disk that is not named they are looked at.
    """
    words = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{words}: raise the limit (ulimit -n) and start again"
    if isinstance(error.filename, str | bytes | os.PathLike):
        return f"{os.fsdecode(error.filename)}: {words}; mend that and start again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        places = (nearest(place) for place in (*folders, Path(tempfile.gettempdir())))
        full = [str(p) for p in places if shutil.disk_usage(p).free < 2**20]
        if full:
            return f"{', '.join(dict.fromkeys(full))}: {words}; free some and start again"
    frames = list(traceback.walk_tb(error.__traceback__))
    where = frames[-1][0].f_globals.get("__name__") if frames else "a library"
    return f"{words} (in {where}, which names no file): mend that and start again"


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a library's own error about a full or forbidden disk into the system's `OSError`.

    TensorStore and ArrayRecord raise ValueError and RuntimeError with the system's words in them.
    The error names `folder`, unless theirs quotes a file that lies elsewhere.
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
