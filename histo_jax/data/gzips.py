"""Reads gzip files that others wrote, and unpacks them without filling the disk."""

import contextlib
import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from histo_jax.data.hdf5 import read_error
from histo_jax.errors import DataError, UserError
from histo_jax.run import signals


def head(path: Path, count: int) -> tuple[bytes, int]:
    """Returns the first `count` unpacked bytes of a file, and its unpacked size modulo 4 GiB.

    Args:
        path: a file; packed if its name ends in `.gz`.
        count: number of bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if path.suffix != ".gz":
            with path.open("rb") as file:
                return file.read(count), path.stat().st_size % 2**32
        with gzip.open(path) as file:
            return file.read(count), _stated_size(path)
    except (OSError, EOFError, zlib.error) as error:
        raise read_error(path, "gzip", error) from None


@contextlib.contextmanager
def unpacked(paths: Iterable[Path], scratch: Path) -> Iterator[dict[Path, Path]]:
    """Yields the unpacked file of each `.gz` in `paths`; they are removed in the end.

    Args:
        paths: files, packed or not.
        scratch: folder to unpack into.

    Raises:
        DataError: a packed file is corrupt, or `scratch` has too little space. Errors raised
            inside the context name the packed file in place of the temporary one.
    """
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=scratch) as folder:
        packed = [path for path in paths if path.suffix == ".gz"]
        plain = {path: Path(folder) / path.stem for path in packed}  # the stem of x.h5.gz is x.h5
        try:
            for path, target in plain.items():
                _unpack(path, target)
            yield plain
        except UserError as error:
            line = str(error)
            for path, target in plain.items():
                line = line.replace(str(target), str(path))
            raise DataError(line) from None


def _unpack(path: Path, target: Path) -> None:
    packed, size = path.stat().st_size, _stated_size(path)
    # Data that cannot be compressed grows, by less than this.
    while size < packed - packed // 1000 - 1024:
        size += 2**32
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise DataError(
            f"{path} needs {size / 1e9:.1f} GB to unpack, and {target.parents[1]} has "
            f"{free / 1e9:.1f} GB left: free some or set another --config.data.tfds_dir"
        )
    try:
        with target.open("wb") as sink:
            for block in signals.stopping(_blocks(path)):
                if sink.tell() + len(block) > size:  # it would fill the disk
                    raise DataError(
                        f"{path} holds more than the {size} bytes that its trailer states; "
                        "download it again, or unpack it by hand"
                    )
                sink.write(block)
    except OSError as error:  # of the scratch folder: `_blocks` turns those of the packed file
        raise OSError(error.errno, error.strerror, str(target.parents[1])) from None


def _stated_size(path: Path) -> int:
    """Returns the unpacked size modulo 4 GiB that the trailer of a gzip file states."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 4, 0))
            return int.from_bytes(file.read(), "little")
    except OSError as error:
        raise read_error(path, "gzip", error) from None


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as source:
            while block := source.read(1 << 20):
                yield block
    except (OSError, EOFError, zlib.error) as error:
        raise read_error(path, "gzip", error) from None
