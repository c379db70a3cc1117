"""Reader of PatchCamelyon's files, as published at https://zenodo.org/record/2546921 (CC0).

Layout: `camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`, each plain or as `.h5.gz`, with
the datasets `x` uint8[n, 96, 96, 3] and `y`, n numbers 0 or 1 of any type and shape (published as
uint8[n, 1, 1, 1]); beside them, if slides are to be known, `..._meta.csv`, whose column `wsi` names
the slide of each patch; columns and datasets beside these are ignored. The published sizes and
SHA-256 are those of TFDS's `patch_camelyon` 2.0.0; they stand in `checksums.tsv`.
"""

import concurrent.futures
import contextlib
import errno
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

from histo_jax.data import raw_files
from histo_jax.data.example import IMAGE_SHAPE, Example
from histo_jax.data.names import clean_column
from histo_jax.data.tables import read_csv
from histo_jax.errors import UserError, one_line
from histo_jax.run import signals

log = logging.getLogger("histo_jax")

SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # ours: the files' name
BASE_URL = "https://zenodo.org/record/2546921/files/"

_STEM = "camelyonpatch_level_2_split_"
_HEAD = 2**24  # bytes that the fingerprint covers
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
        UserError: files are missing. Only the test split may be, and only as a whole.
    """
    if not raw_dir.is_dir():
        what = "is no folder" if raw_dir.exists() else "no such folder"
        raise UserError(f"{raw_dir}: {what}; set --config.data.raw_dir")
    found = {}
    missing = []
    for split, name in SPLITS.items():
        names = [f"{_STEM}{name}_{kind}.h5" for kind in "xy"]
        x, y = (_plain_or_packed(raw_dir / name) for name in names)
        meta = raw_dir / f"{_STEM}{name}_meta.csv"
        if x and y:
            found[split] = Files(x, y, meta if meta.is_file() else None)
        elif x or y or split != "test":
            missing += [name for name, path in zip(names, (x, y), strict=True) if not path]
    if missing:
        raise _missing(raw_dir, missing)
    return found


def _missing(raw_dir: Path, names: list[str]) -> UserError:
    listed = ", ".join([str(raw_dir / names[0]), *names[1:]])
    are, their = ("is", "its") if len(names) == 1 else ("are", "their")
    hint = raw_files.likely_reason(
        raw_dir, names, lambda place: all(_plain_or_packed(place / name) for name in names)
    )
    return UserError(
        f"{listed} {are} missing, and so {are} {their} .gz; "
        + (hint or f"put what is missing there: the published files come from {BASE_URL}")
    )


def fingerprint(raw_dir: Path) -> tuple[str, str]:
    """Returns two SHA-256 of the files of `find`: of what they hold, and of their times.

    The first covers the slides, and of the images and labels the size and the first 16 MiB, packed
    or not; the second the times of files that are longer.

    Raises:
        UserError: as `find`; or a packed file or a `_meta.csv` cannot be read.
    """
    content, times = hashlib.sha256(), hashlib.sha256()
    for split, its in find(raw_dir).items():
        for kind, path in (("x", its.x), ("y", its.y)):
            head, size = _head_and_size(path)
            content.update(f"{split} {kind} {size} ".encode() + head)
            if len(head) == _HEAD:
                times.update(f"{split} {kind} {path.stat().st_mtime_ns}\n".encode())
        slides = [] if its.meta is None else _read_slides(its.meta)
        content.update("\n".join([split, *slides]).encode())
    return content.hexdigest(), times.hexdigest()


def _head_and_size(path: Path) -> tuple[bytes, int]:
    """Returns the first `_HEAD` bytes of an unpacked file, and its size modulo 4 GiB."""
    try:
        if path.suffix != ".gz":
            with path.open("rb") as file:
                return file.read(_HEAD), path.stat().st_size % 2**32
        with gzip.open(path) as file:
            return file.read(_HEAD), _announced_size(path)
    except (OSError, EOFError, zlib.error) as error:
        raise _refusal(path, "gzip", error) from None


def _announced_size(path: Path) -> int:
    """Returns the size modulo 4 GiB that a gzip's end tells."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 4, 0))
            return int.from_bytes(file.read(), "little")
    except OSError as error:
        raise _refusal(path, "gzip", error) from None


def download(manager: tfds.download.DownloadManager) -> dict[str, Files]:
    """Downloads the six packed files into TFDS's folder of downloads; whole ones are reused.

    The manager must know the SHA-256 of each URL. It renames only files that pass.

    Raises:
        UserError: names the URL that could not be downloaded or is not as published.
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
        UserError: a packed file is damaged, or `scratch` has too little space.
    """
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=scratch) as folder:
        packed = [path for path in (files.x, files.y) if path.suffix == ".gz"]
        plain = {path: Path(folder) / path.stem for path in packed}  # the stem of x.h5.gz is x.h5
        try:
            for path, target in plain.items():
                _unpack(path, target)
            yield files._replace(x=plain.get(files.x, files.x), y=plain.get(files.y, files.y))
        except UserError as error:
            line = str(error)
            for path, target in plain.items():
                line = line.replace(str(target), str(path))  # the file that stays
            raise UserError(line) from None


def check(files: Files) -> int:
    """Returns the number of patches of plain files; reads all but the images.

    Raises:
        UserError: names the first file that is not as published.
    """
    with _open(files.x, "x") as images:
        _check_images(files.x, images)
        return len(_labels_and_slides(files, len(images))[0])


def read(files: Files) -> Iterator[Example]:
    """Reads plain files in their order; the id is the SHA-1 of the pixels, as Kaggle's are.

    Raises:
        UserError: as `check`, before the first patch; or the images are damaged.
    """
    with _open(files.x, "x") as images:
        _check_images(files.x, images)
        labels, slides = _labels_and_slides(files, len(images))
        for start in range(0, len(images), _CHUNK):
            some = slice(start, start + _CHUNK)
            with _readable(files.x):
                patches = images[some]
            for image, label, slide in zip(patches, labels[some], slides[some], strict=True):
                yield Example(hashlib.sha1(image).hexdigest(), image, int(label), slide)


def _labels_and_slides(files: Files, count: int) -> tuple[np.ndarray, list[str]]:
    """Returns uint8[count] labels and as many slides; '' = not known."""
    labels = _read_labels(files.y, count, files.x.name)
    if files.meta is None:
        return labels, [""] * count
    slides = _read_slides(files.meta)
    named = sum(map(bool, slides))
    if not named == len(slides) == count:
        raise UserError(
            f"{files.meta} names the slides of {named} in {len(slides)} patches, and "
            f"{files.x.name} holds {count}; complete it, or remove it where slides are not known"
        )
    return labels, slides


def _read_labels(path: Path, count: int, images: str) -> np.ndarray:
    """Returns uint8[count] labels from numbers of any type and shape."""
    with _open(path, "y") as data:
        if data.dtype.kind not in "biuf":
            raise UserError(f"{path}: y is {_form(data)}, and must be numbers 0 and 1; write it so")
        if data.size != count:  # before they are read: a damaged number may be huge
            raise UserError(
                f"{path} holds {data.size or 0} labels, {_form(data)}, for the {count} patches of "
                f"{images}; each patch needs one, 0 or 1"
            )
        with _readable(path):
            labels = np.asarray(data[()]).reshape(-1)
    wrong = np.flatnonzero((labels != 0) & (labels != 1))
    if wrong.size:
        more = f", and {wrong.size - 1} more of {count} are wrong" if wrong.size > 1 else ""
        raise UserError(
            f"{path}: label {labels[wrong[0]]} of patch {wrong[0]} must be 0 or 1{more}; mend the "
            "labels"
        )
    return labels.astype(np.uint8)


def _read_slides(path: Path) -> list[str]:
    """Returns the slide of each patch; '' = not known."""
    return clean_column(read_csv(path, ("wsi",))["wsi"]).tolist()


def _check_images(path: Path, data: h5py.Dataset) -> None:
    """Refuses what is not uint8[n, 96, 96, 3] with n > 0, and says how to make it so."""
    found: tuple[int, ...] = data.shape or ()  # None is HDF5's "null"
    if data.dtype == np.uint8 and found[1:] == IMAGE_SHAPE and found[0]:
        return
    if found[1:] == (IMAGE_SHAPE[2], *IMAGE_SHAPE[:2]):
        hint = "put the channels last"
    elif found[1:] == (*IMAGE_SHAPE[:2], 4):
        hint = "leave the fourth channel out"
    elif found[1:] == IMAGE_SHAPE and data.dtype.kind == "f":
        hint = "write whole numbers from 0 to 255"
    else:
        hint = "write it in this form"
    raise UserError(f"{path}: x is {_form(data)}, and must be uint8[n, 96, 96, 3]: {hint}")


def _form(data: h5py.Dataset) -> str:
    return f"{data.dtype}{list(data.shape or ())}"


def _plain_or_packed(plain: Path) -> Path | None:
    packed = plain.with_name(f"{plain.name}.gz")
    return plain if plain.is_file() else packed if packed.is_file() else None


@contextlib.contextmanager
def _open(path: Path, key: str) -> Iterator[h5py.Dataset]:
    """Opens dataset `key`, which must lie in the file itself and be readable here."""
    with contextlib.ExitStack() as stack:
        with _readable(path):
            file = stack.enter_context(_open_file(path))
            data = file.get(key)
            names = ", ".join(sorted(file)[:5])[:80] or "nothing"
        if not isinstance(data, h5py.Dataset):
            holds = f"{key} is a group or a broken link" if key in names else f"it holds {names}"
            raise UserError(f"{path} holds no dataset {key!r} ({holds}); write it under this name")
        with _readable(path):
            elsewhere = data.is_virtual or data.external
            filters = data.id.get_create_plist()
            codes = [filters.get_filter(i)[::3] for i in range(filters.get_nfilters())]
            lacking = [
                f"filter {code} {name.decode(errors='replace')}".strip()
                for code, name in codes
                if not h5py.h5z.filter_avail(code)
            ]
        if elsewhere:
            raise UserError(f"{path}: {key} lies in other files; write it into this one")
        if lacking:
            raise UserError(
                f"{path}: {key} is packed by HDF5's {lacking[0]!r}, which is not installed; write "
                "it with gzip, lzf or unpacked"
            )
        with _readable(path):
            _check_sizes(path, data, path.stat().st_size)
        yield data


def _open_file(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        # Some mounts know no locks. Another program's lock is EAGAIN, or on old NFS EACCES.
        if "unable to lock" not in str(error) or error.errno in (errno.EAGAIN, errno.EACCES):
            raise
        return h5py.File(path, "r", locking=False)


def _check_sizes(path: Path, data: h5py.Dataset, size: int) -> None:
    """Raises where reading would take far more memory or time than a file of `size`."""
    # Deflate packs a thousand bytes into one. What was never written is read as zeros, for ever.
    width = data.dtype.itemsize
    if math.prod(data.shape or ()) * width > size * 2**15:
        raise ValueError(f"{_form(data)} cannot lie in {size} bytes")
    if not data.chunks or not data.id.get_create_plist().get_nfilters():
        return
    chunk = math.prod(data.chunks) * width
    if chunk > _LARGEST_CHUNK:
        raise UserError(
            f"{path}: chunks of {chunk} bytes are too large to unpack; write it again in chunks of "
            "some 64 patches"
        )
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
    except UserError:
        raise
    except Exception as error:  # h5py raises many types on damaged files
        raise _refusal(path, "HDF5", error) from None


def _refusal(path: Path, form: str, error: Exception) -> UserError:
    """Returns what to raise where reading has failed: the system's words, or that of damage."""
    if raw_files.is_system_error(error):
        return raw_files.unreadable(path, error)
    if "already open for" in str(error):
        return UserError(
            f"{path} is being written, or its writer was killed: close it there, or clear the mark "
            "by h5clear -s"
        )
    return UserError(
        f"{path} is no readable {form} ({one_line(error)}); write or download it again"
    )


def _unpack(path: Path, target: Path) -> None:
    packed, size = path.stat().st_size, _announced_size(path)
    # What cannot be packed grows, by less than this.
    while size < packed - packed // 1000 - 1024:
        size += 2**32
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise UserError(
            f"{path} needs {size / 1e9:.1f} GB to unpack, and {target.parents[1]} has "
            f"{free / 1e9:.1f} GB left: free some or set another --config.data.tfds_dir"
        )
    try:
        with target.open("wb") as sink:
            for some in signals.stopping(_gunzip(path)):
                if sink.tell() + len(some) > size:  # it would fill the disk
                    raise UserError(
                        f"{path} holds more than the {size} bytes that its end announces; "
                        "download it again, or unpack it by hand"
                    )
                sink.write(some)
    except OSError as error:  # of the scratch folder; those of the packed file are none by now
        raise OSError(error.errno, error.strerror, str(target.parents[1])) from None


def _gunzip(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as source:
            while some := source.read(1 << 20):
                yield some
    except (OSError, EOFError, zlib.error) as error:
        raise _refusal(path, "gzip", error) from None


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
            if signals.requested():
                raise signals.Preempted
        return Path(os.fspath(done.result()))
    except NonMatchingChecksumError:
        reason = "its size or SHA-256 is not the published one"
    except (requests.RequestException, tfds.download.DownloadError) as error:
        cause: BaseException = error
        while cause.__context__:  # the first one says it in plain words
            cause = cause.__context__
        reason = one_line(cause)
    except (KeyboardInterrupt, signals.Preempted):
        # The thread that downloads would go on, and the process wait for it: hours for 6 GB. It
        # counts every MiB here, and dies of that.
        manager._downloader._pbar_dl_size = None
        raise
    finally:
        # TFDS leaves broken downloads behind. The caller's lock keeps others out.
        for part in Path(manager.download_dir).rglob(f"{resource.get_dl_fname(url)}.tmp.*"):
            shutil.rmtree(part, ignore_errors=True)
    raise UserError(
        f"{url} cannot be downloaded ({reason}): try again later, or download all files by hand "
        "and set --config.data.raw_dir to their folder"
    )
