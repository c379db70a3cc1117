"""Raw files that others keep: why the system refuses one, and where missing ones lie instead."""

import collections
import contextlib
import errno
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from histo_jax.errors import UserError

# What libraries raise where a number inside a damaged file is no sensible offset or length.
_DAMAGE = {errno.EINVAL, errno.EFBIG, errno.EOVERFLOW, errno.ESPIPE, errno.EFAULT}
_IN_USE = "close it in the program that has it open"
_REMEDIES = {
    errno.EAGAIN: _IN_USE,
    errno.EBUSY: _IN_USE,
    errno.ETXTBSY: _IN_USE,
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENOENT: "restore it",
    errno.ELOOP: "restore it",
    errno.EISDIR: "put the file there",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free some memory",
    errno.ENOLCK: "unset HDF5_USE_FILE_LOCKING, or copy it to another disk",
}
_IMAGES = {".tif", ".tiff", ".png", ".jpg", ".jpeg"}
# Folders below the raw data that are searched for missing files.
_DEPTH = 3


def is_system_error(error: Exception) -> bool:
    """Whether the system could not read a file, which says nothing about what the file holds."""
    if isinstance(error, OSError):
        return bool(error.errno) and error.errno not in _DAMAGE
    return isinstance(error, MemoryError)


def unreadable(path: Path, error: Exception, also: str = "") -> UserError:
    """Returns the error to raise for a file that the system could not read.

    Args:
        path: the file.
        error: one for which `is_system_error` holds.
        also: what else could not be read, as ', nor can 3 more of 9'.
    """
    number = error.errno if isinstance(error, OSError) else errno.ENOMEM
    words = os.strerror(number or 0)
    if number == errno.EAGAIN:
        words = f"{_lock_holder(path)} has locked it"
    remedy = _REMEDIES.get(number or 0, "check its disk or mount, and start again")
    return UserError(f"{path} cannot be read ({words}){also}: {remedy}")


def _lock_holder(path: Path) -> str:
    """Names the process that holds a lock on a file, as far as the system tells."""
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
    """Yields the folder above and those below, in which misplaced files may lie."""
    yield folder.absolute().parent
    for place, _ in _walk(folder):
        yield place


def find_stems(folder: Path, stems: Collection[str]) -> tuple[int, Path | None]:
    """Looks below a folder for images of some names, whatever their suffix and case.

    Returns:
        how many there are, and one at the most frequent place, with the most frequent suffix.
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
    """Says why entries of a folder may be missing, and the fix; '' = nothing like them is found.

    Args:
        folder: where they should be.
        missing: their names.
        fits: whether a folder holds all that is needed.
    """
    with contextlib.suppress(OSError):  # of folders that are none of our business
        for place in folders_around(folder):
            if fits(place):
                return f"{place} has all: give this folder instead"
        for path in sorted(folder.iterdir()):
            if path.name in missing:
                what = "folder" if path.is_dir() else "file" if path.is_file() else "broken link"
                return f"{path} is a {what}"
            plain = path.name.lower().replace(".hdf5", ".h5")
            if plain in missing:
                return f"rename {path.name} to {plain}"
    return archives(folder)


def archives(folder: Path) -> str:
    """Says which archives in a folder are still to be unpacked; '' = none."""
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".zip", ".tar", ".tgz")
    )
    return f"unpack {', '.join(names[:3])} in {folder}" if names else ""


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders to a depth of `_DEPTH` with their files, in a fixed order."""
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(folders) if depth < _DEPTH else []
        yield Path(place), sorted(names)
