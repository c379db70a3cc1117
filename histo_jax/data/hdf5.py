"""Opens HDF5 files that others wrote: what is corrupt, huge or unsupported is refused in a line."""

import contextlib
import errno
import math
from collections.abc import Iterator
from pathlib import Path

import h5py

from histo_jax.data import raw_files
from histo_jax.errors import DataError, UserError, one_line

_LARGEST_CHUNK = 2**27  # bytes


@contextlib.contextmanager
def open_dataset(path: Path, key: str) -> Iterator[h5py.Dataset]:
    """Opens dataset `key`, which must be stored in the file itself and be readable here.

    Raises:
        DataError: names the file, and what is wrong with it.
    """
    with contextlib.ExitStack() as stack:
        with readable(path):
            file = stack.enter_context(_open_file(path))
            data = file.get(key)
            names = ", ".join(sorted(file)[:5])[:80] or "nothing"
        if not isinstance(data, h5py.Dataset):
            content = f"{key} is a group or a broken link" if key in names else f"it holds {names}"
            raise DataError(f"{path} has no dataset {key!r} ({content}); write it under this name")
        with readable(path):
            is_elsewhere = data.is_virtual or data.external
            missing_filters = _missing_filters(data)
        if is_elsewhere:
            raise DataError(f"{path}: {key} is stored in other files; write it into this one")
        if missing_filters:
            raise DataError(
                f"{path}: {key} is compressed by HDF5's {missing_filters[0]!r}, which is not "
                "installed; write it with gzip, lzf or uncompressed"
            )
        with readable(path):
            _check_sizes(path, data, path.stat().st_size)
        yield data


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the errors of h5py into one line.

    Raises:
        DataError: names the file, and what is wrong with it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # h5py raises many types on corrupt files
        raise read_error(path, "HDF5", error) from None


def describe(data: h5py.Dataset) -> str:
    """Returns dtype and shape, as in 'uint8[10, 96, 96, 3]'."""
    return f"{data.dtype}{list(data.shape or ())}"


def read_error(path: Path, file_format: str, error: Exception) -> UserError:
    """Returns the error for a failed read: the system's reason, or that the file is corrupt."""
    if raw_files.is_system_error(error):
        return raw_files.unreadable(path, error)
    if "already open for" in str(error):
        return DataError(
            f"{path} is being written, or its writer was killed: close it there, or clear the flag "
            "with h5clear -s"
        )
    return DataError(
        f"{path} is not a readable {file_format} file ({one_line(error)}); write it again or "
        "download it again"
    )


def _open_file(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        # Some mounts have no locks. Another program's lock is EAGAIN, or on old NFS EACCES.
        if "unable to lock" not in str(error) or error.errno in (errno.EAGAIN, errno.EACCES):
            raise
        return h5py.File(path, "r", locking=False)


def _missing_filters(data: h5py.Dataset) -> list[str]:
    """Returns number and name of the compression filters that are not installed."""
    filters = data.id.get_create_plist()
    codes = [filters.get_filter(i)[::3] for i in range(filters.get_nfilters())]
    return [
        f"filter {code} {name.decode(errors='replace')}".strip()
        for code, name in codes
        if not h5py.h5z.filter_avail(code)
    ]


def _check_sizes(path: Path, data: h5py.Dataset, size: int) -> None:
    """Refuses what would take far more memory or time to read than a file of `size` bytes."""
    # Deflate compresses at most a thousand to one. What was never written is read as zeros.
    width = data.dtype.itemsize
    if math.prod(data.shape or ()) * width > size * 2**15:
        raise ValueError(f"{describe(data)} does not fit into {size} bytes")
    if not data.chunks or not data.id.get_create_plist().get_nfilters():
        return
    chunk = math.prod(data.chunks) * width
    if chunk > _LARGEST_CHUNK:
        raise DataError(
            f"{path}: chunks of {chunk} bytes are too large to decompress; write it again in "
            "chunks of some 64 patches"
        )
    # Decompression ends where the compressed bytes do, not where the chunk is full; compressed
    # chunks are no larger than plain ones, but for checksums.
    stored: list[int] = []
    data.id.chunk_iter(lambda info: stored.append(info.size))
    if max(stored, default=0) > chunk + 1024:
        raise ValueError("a compressed chunk is larger than it should be when decompressed")
