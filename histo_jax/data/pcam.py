"""Reader of PatchCamelyon's files, as published at https://zenodo.org/record/2546921 (CC0).

Layout: `camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`, each plain or as `.h5.gz`, with
the datasets `x` uint8[n, 96, 96, 3] and `y` uint8[n, 1, 1, 1]; beside them, if slides are to be
known, `..._meta.csv`, whose column `wsi` names the slide of each patch. The published sizes and
SHA-256 are those of TFDS's `patch_camelyon` 2.0.0; they stand in `checksums.tsv`.
"""

import concurrent.futures
import contextlib
import gzip
import hashlib
import logging
import math
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader, resource
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from histo_jax import preemption
from histo_jax.data.example import IMAGE_SHAPE, Example
from histo_jax.data.tables import read_csv
from histo_jax.errors import ExpectedError, one_line

log = logging.getLogger("histo_jax")

SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # ours: the files' name
BASE_URL = "https://zenodo.org/record/2546921/files/"

_STEM = "camelyonpatch_level_2_split_"
_CHUNK = 512  # patches in memory at once: 14 MB
_LARGEST_CHUNK = 2**27  # bytes
_RETRIES = 4  # 6 seconds; TFDS's ten take 3.5 minutes to say that there is no network


class Files(NamedTuple):
    """The files of one split; `meta` is None where slides are not known."""

    x: Path
    y: Path
    meta: Path | None


def find(raw_dir: Path) -> dict[str, Files]:
    """Returns the files of each split; a plain file goes before a packed one. Opens none.

    Raises:
        ExpectedError: a file is missing. Only the test split may be, and only as a whole.
    """
    if not raw_dir.is_dir():
        raise ExpectedError(f"{raw_dir}: no such folder; set --config.data.raw_dir")
    found = {}
    for split, name in SPLITS.items():
        x, y = (_plain_or_packed(raw_dir / f"{_STEM}{name}_{kind}.h5") for kind in "xy")
        meta = raw_dir / f"{_STEM}{name}_meta.csv"
        if x and y:
            found[split] = Files(x, y, meta if meta.is_file() else None)
        elif x or y or split != "test":
            missing = raw_dir / f"{_STEM}{name}_{'y' if x else 'x'}.h5"
            raise ExpectedError(
                f"{missing} is missing, and so is its .gz; download it from {BASE_URL}"
            )
    return found


def raw_files(raw_dir: Path) -> list[Path]:
    """Returns all files of `find`, always in the same order."""
    return [path for files in find(raw_dir).values() for path in files if path]


def download(manager: tfds.download.DownloadManager) -> dict[str, Files]:
    """Downloads the six packed files into TFDS's folder of downloads; whole ones are reused.

    The manager must know the SHA-256 of each URL. It renames only files that pass.

    Raises:
        ExpectedError: names the URL that could not be downloaded or is not as published.
    """
    log.info("downloading PatchCamelyon, 8 GB, into %s", manager.download_dir)
    log.info("it names no slides: they need --config.data.raw_dir with the _meta.csv files, too")
    downloader.MAX_RETRIES = _RETRIES
    # One after another, small ones first: where one fails, TFDS would not stop the others.
    paths = {
        (split, kind): _download(manager, f"{BASE_URL}{_STEM}{name}_{kind}.h5.gz")
        for kind in "yx"
        for split, name in SPLITS.items()
    }
    return {split: Files(paths[split, "x"], paths[split, "y"], None) for split in SPLITS}


@contextlib.contextmanager
def unpacked(files: Files, scratch: Path) -> Iterator[Files]:
    """Gives plain files: packed ones are unpacked into `scratch` and removed at the end.

    Raises:
        ExpectedError: a packed file is damaged, or `scratch` has too little space.
    """
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=scratch) as folder:
        packed = [path for path in (files.x, files.y) if path.suffix == ".gz"]
        plain = {path: Path(folder) / path.stem for path in packed}  # the stem of x.h5.gz is x.h5
        try:
            for path, target in plain.items():
                _unpack(path, target)
            yield files._replace(x=plain.get(files.x, files.x), y=plain.get(files.y, files.y))
        except ExpectedError as error:
            line = str(error)
            for path, target in plain.items():
                line = line.replace(str(target), str(path))  # the file that stays
            raise ExpectedError(line) from None


def check(files: Files) -> int:
    """Returns the number of patches of plain files; reads all but the images.

    Raises:
        ExpectedError: names the first file that is not as published.
    """
    with _open(files.x, "x", IMAGE_SHAPE) as images:
        return len(_labels_and_slides(files, len(images))[0])


def read(files: Files) -> Iterator[Example]:
    """Reads plain files in their order; the id is the SHA-1 of the pixels, as Kaggle's are.

    Raises:
        ExpectedError: as `check`, before the first patch; or the images are damaged.
    """
    with _open(files.x, "x", IMAGE_SHAPE) as images:
        labels, slides = _labels_and_slides(files, len(images))
        for start in range(0, len(images), _CHUNK):
            some = slice(start, start + _CHUNK)
            with _readable(files.x):
                patches = images[some]
            for image, label, slide in zip(patches, labels[some], slides[some], strict=True):
                yield Example(hashlib.sha1(image).hexdigest(), image, int(label), slide)


def _labels_and_slides(files: Files, count: int) -> tuple[np.ndarray, list[str]]:
    """Returns uint8[count] labels and as many slides; '' = not known."""
    with _open(files.y, "y", (1, 1, 1)) as data:
        if len(data) != count:  # before they are read: a damaged number may be huge
            raise ExpectedError(
                f"{files.y} holds {len(data)} labels for the {count} patches of {files.x.name}; "
                "download both again"
            )
        with _readable(files.y):
            labels = data[:].reshape(-1)
    wrong = np.flatnonzero(labels > 1)
    if wrong.size:
        raise ExpectedError(
            f"{files.y}: label {labels[wrong[0]]} of patch {wrong[0]} must be 0 or 1; "
            "download it again"
        )
    if files.meta is None:
        return labels, [""] * count
    try:
        table = read_csv(files.meta)
    except (ValueError, OSError) as error:
        raise _damaged(files.meta, "CSV", error) from None
    if "wsi" not in table:
        raise ExpectedError(f"{files.meta} has no column wsi; download it again or remove it")
    slides = table["wsi"]
    named = int((slides != "").sum())
    if not named == len(slides) == count:
        raise ExpectedError(
            f"{files.meta} names the slides of {named} in {len(slides)} patches, and "
            f"{files.x.name} holds {count}; download both again"
        )
    return labels, slides.tolist()


def _plain_or_packed(plain: Path) -> Path | None:
    packed = plain.with_name(f"{plain.name}.gz")
    return plain if plain.is_file() else packed if packed.is_file() else None


@contextlib.contextmanager
def _open(path: Path, key: str, shape: tuple[int, ...]) -> Iterator[h5py.Dataset]:
    """Opens dataset `key`, which must be uint8[n, *shape] with n > 0."""
    with contextlib.ExitStack() as stack:
        with _readable(path):
            file = stack.enter_context(h5py.File(path, "r"))
            data = file.get(key)
            dtype = getattr(data, "dtype", None)
            found: tuple[int, ...] = getattr(data, "shape", None) or ()
        if not isinstance(data, h5py.Dataset):
            raise ExpectedError(f"{path} holds no dataset {key!r}; download it again")
        if dtype != np.uint8 or found[1:] != shape or not found[0]:  # () is HDF5's "null", too
            raise ExpectedError(
                f"{path}: {key} is {dtype}{list(found)}, and must be uint8 of some "
                f"{list(shape)}; download it again"
            )
        with _readable(path):
            _check_sizes(data, path.stat().st_size)
        yield data


def _check_sizes(data: h5py.Dataset, size: int) -> None:
    """Raises ValueError where reading would take far more memory or time than a file of `size`."""
    # Deflate packs a thousand bytes into one. What was never written is read as zeros, for ever.
    if math.prod(data.shape) > size * 2**15:
        raise ValueError(f"{data.shape[0]} patches cannot lie in {size} bytes")
    if not data.chunks or not data.id.get_create_plist().get_nfilters():
        return
    chunk = math.prod(data.chunks)
    if chunk > _LARGEST_CHUNK:
        raise ValueError(f"chunks of {chunk} bytes are too large to unpack")
    # Unpacking ends where the packed bytes do, not where the chunk is full; packed chunks are no
    # larger than plain ones, but for checksums.
    stored: list[int] = []
    data.id.chunk_iter(lambda info: stored.append(info.size))
    if max(stored, default=0) > chunk + 1024:
        raise ValueError("a packed chunk is larger than it should be unpacked")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # h5py raises many types on damaged files
        raise _damaged(path, "HDF5", error) from None


def _unpack(path: Path, target: Path) -> None:
    packed = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(packed - 4, 0))
        size = int.from_bytes(file.read(), "little")
    # It is modulo 4 GiB; and what cannot be packed grows, by less than this.
    while size < packed - packed // 1000 - 1024:
        size += 2**32
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise ExpectedError(
            f"{path} needs {size / 1e9:.1f} GB to unpack, and {target.parents[1]} has "
            f"{free / 1e9:.1f} GB left: free some or set another --config.data.tfds_dir"
        )
    try:
        with gzip.open(path) as source, target.open("wb") as sink:
            for some in preemption.stopping(iter(lambda: source.read(1 << 20), b"")):
                if sink.tell() + len(some) > size:  # it would fill the disk
                    raise ExpectedError(
                        f"{path} holds more than the {size} bytes that its end announces; "
                        "download it again, or unpack it by hand"
                    )
                sink.write(some)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, "gzip", error) from None


def _download(manager: tfds.download.DownloadManager, url: str) -> Path:
    log.info("downloading %s, unless it is there", url)
    # In a thread of its own, as signals are noticed between two looks only.
    done: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            done.set_result(manager.download(url))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while not concurrent.futures.wait([done], timeout=0.2).done:
            if preemption.requested():
                raise preemption.Preempted
        return Path(os.fspath(done.result()))
    except NonMatchingChecksumError:
        reason = "its size or SHA-256 is not the published one"
    except (requests.RequestException, tfds.download.DownloadError) as error:
        cause: BaseException = error
        while cause.__context__:  # the first one says it in plain words
            cause = cause.__context__
        reason = one_line(cause)
    except (KeyboardInterrupt, preemption.Preempted):
        # The thread that downloads would go on, and the process wait for it: hours for 6 GB. It
        # counts every MiB here, and dies of that.
        manager._downloader._pbar_dl_size = None
        raise
    finally:
        # TFDS leaves broken downloads behind. The caller's lock keeps others out.
        for part in Path(manager.download_dir).rglob(f"{resource.get_dl_fname(url)}.tmp.*"):
            shutil.rmtree(part, ignore_errors=True)
    raise ExpectedError(
        f"{url} cannot be downloaded ({reason}): try again later, or download all files by hand "
        "and set --config.data.raw_dir to their folder"
    )


def _damaged(path: Path, form: str, error: Exception) -> ExpectedError:
    return ExpectedError(
        f"{path} is no readable {form} ({one_line(error)}); remove it and download it again"
    )
