"""Raw files of the user: why the system cannot read one, and where missing ones may be."""

import collections
import contextlib
import errno
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from histo_jax.errors import DataError

# What libraries raise where a number inside a corrupt file is not a valid offset or length.
_CORRUPTION = {errno.EINVAL, errno.EFBIG, errno.EOVERFLOW, errno.ESPIPE, errno.EFAULT}
_IN_USE = "close it in the program that uses it"
_FIXES = {
    errno.EAGAIN: _IN_USE,
    errno.EBUSY: _IN_USE,
    errno.ETXTBSY: _IN_USE,
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENOENT: "restore it",
    errno.ELOOP: "restore it",
    errno.EISDIR: "replace the folder by the file",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free some memory",
    errno.ENOLCK: "unset HDF5_USE_FILE_LOCKING, or copy it to another disk",
}
_IMAGES = {".tif", ".tiff", ".png", ".jpg", ".jpeg"}
# Folders below the raw data that are searched for missing files.
_DEPTH = 3


def is_system_error(error: Exception) -> bool:
    """Whether the system could not read a file, which does not mean that the file is corrupt."""
    if isinstance(error, OSError):
        return bool(error.errno) and error.errno not in _CORRUPTION
    return isinstance(error, MemoryError)


def read_content(path: Path, limit: int) -> bytes:
    """Returns the content of a file, at most its first `limit` bytes."""
    with path.open("rb") as file:
        # `read(limit)` would allocate that much: twice the time, where files are small.
        return file.read(min(os.fstat(file.fileno()).st_size, limit))


def unreadable(path: Path, error: Exception, also: str = "") -> DataError:
    """Returns the error for a file that the system could not read.

    Args:
        path: the file.
        error: one for which `is_system_error` holds.
        also: number of other files that could not be read, as in ', nor can 3 more of 9'.
    """
    number = error.errno if isinstance(error, OSError) else errno.ENOMEM
    reason = os.strerror(number or 0)
    if number == errno.EAGAIN:
        reason = f"{_lock_holder(path)} has locked it"
    fix = _FIXES.get(number or 0, "check its disk or mount, and rerun")
    return DataError(f"{path} cannot be read ({reason}){also}: {fix}")


def _lock_holder(path: Path) -> str:
    """Returns the process that holds a lock on a file, as far as the system shows it."""
    with contextlib.suppress(OSError, ValueError):
        status = path.stat()
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        for line in Path("/proc/locks").read_text().splitlines():
            *_, number, place, _, _ = line.split()
            if place == f"{device}:{status.st_ino}":
                program = Path(f"/proc/{number}/comm").read_text().strip()
                return f"process {number} ({program})"
    return "another program"


def folders_around(folder: Path) -> Iterator[Path]:
    """Yields the folder above and those below, which may contain misplaced files."""
    yield folder.absolute().parent
    for place, _ in _walk(folder):
        yield place


def find_stems(folder: Path, stems: Collection[str]) -> tuple[int, Path | None]:
    """Searches below a folder for images by name, ignoring suffix and case.

    Returns:
        their number, and an example in the most frequent folder with the most frequent suffix.
    """
    counts: collections.Counter[tuple[Path, str]] = collections.Counter()
    examples: dict[tuple[Path, str], Path] = {}
    for place, names in _walk(folder):
        for name in names:
            stem, suffix = os.path.splitext(name)
            if stem.lower() in stems and suffix.lower() in _IMAGES:
                counts[place, suffix] += 1
                examples.setdefault((place, suffix), place / name)
    if not counts:
        return 0, None
    return counts.total(), examples[counts.most_common(1)[0][0]]


def likely_reason(folder: Path, missing: list[str], fits: Callable[[Path], bool]) -> str:
    """Returns why entries of a folder may be missing, and the fix; '' = no likely reason.

    Args:
        folder: where they should be.
        missing: their names.
        fits: whether a folder contains all that is needed.
    """
    with contextlib.suppress(OSError):  # of folders that are not readable
        for place in folders_around(folder):
            if fits(place):
                return f"{place} has all files: give this folder instead"
        for path in sorted(folder.iterdir()):
            if path.name in missing:
                what = "folder" if path.is_dir() else "file" if path.is_file() else "broken link"
                return f"{path} is a {what}"
            plain = path.name.lower().replace(".hdf5", ".h5")
            if plain in missing:
                return f"rename {path.name} to {plain}"
    return archives(folder)


def archives(folder: Path) -> str:
    """Returns which archives in a folder should be unpacked, as a fix; '' = there are none."""
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".zip", ".tar", ".tgz")
    )
    return f"unpack {', '.join(names[:3])} in {folder}" if names else ""


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yields folders to a depth of `_DEPTH` with the names of their files, in a fixed order."""
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(folders) if depth < _DEPTH else []
        yield Path(place), sorted(names)
