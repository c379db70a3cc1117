"""The source `pcam`: PatchCamelyon's files as published at https://zenodo.org/record/2546921 (CC0).

Layout: `camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5`, each plain or as `.h5.gz`, with
the datasets `x` uint8[n, 96, 96, 3] and `y`, n numbers 0 or 1 of any type and shape (published as
uint8[n, 1, 1, 1]). If slides are to be known, `..._meta.csv` beside them names the slide of each
patch in its column `wsi`; other columns and datasets are ignored. The published sizes and SHA-256
are those of TFDS's `patch_camelyon` 2.0.0, in `checksums.tsv`.
"""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from histo_jax.config import DataConfig
from histo_jax.data import downloads, gzips, hdf5, raw_files
from histo_jax.data.example import Example, SizedExamples
from histo_jax.data.names import clean_column
from histo_jax.data.tables import read_csv
from histo_jax.errors import DataError
from histo_jax.registry import register_source
from histo_jax.run.files import expand

log = logging.getLogger("histo_jax")

SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # ours: the files' name
BASE_URL = "https://zenodo.org/record/2546921/files/"

_SIZE = 96  # height and width of a patch, pixels
_SHAPE = (_SIZE, _SIZE, 3)
_STEM = "camelyonpatch_level_2_split_"
_HEAD = 2**24  # bytes that the fingerprint covers
_CHUNK = 512  # patches in memory at once: 14 MB


class Files(NamedTuple):
    """The files of one split; `meta` is None where slides are not known."""

    x: Path
    y: Path
    meta: Path | None


@register_source("pcam")
class PatchCamelyon:
    """PatchCamelyon's files.

    Args:
        data: `raw_dir` is their folder; without one they are downloaded into `tfds_dir`.
    """

    # PatchCamelyon's README: 0.243 um at 40x, undersampled to 10x; the label is of the centre.
    classes = ("no tumour", "tumour")
    image_size, label_region, mpp = _SIZE, 32, 0.972

    origin = "the published files"

    def __init__(self, data: DataConfig) -> None:
        self._raw_dir = expand(data.raw_dir, "--config.data.raw_dir") if data.raw_dir else None
        self._downloads = expand(data.tfds_dir, "--config.data.tfds_dir") / "downloads" / "pcam"
        self.scratch = Path()

    @staticmethod
    def recognizes(raw_dir: Path) -> bool:
        """Whether a folder has at least one of the files."""
        return any(raw_dir.glob(f"{_STEM}*"))

    @functools.cached_property
    def _fingerprints(self) -> tuple[str, str] | tuple[None, None]:
        return fingerprint(self._raw_dir) if self._raw_dir else (None, None)

    def fingerprint(self) -> str | None:
        """Returns the hash of the files' content, None without a folder."""
        return self._fingerprints[0]

    def modified(self) -> str | None:
        """Returns the hash of the modification times of large files, None without a folder."""
        return self._fingerprints[1]

    def splits(self) -> dict[str, Iterable[Example]]:
        """Returns the patches of each split; downloads the files where no folder is given."""
        found = find(self._raw_dir) if self._raw_dir else download(self._downloads)
        # Plain files are all checked before the first record is written, packed ones when unpacked.
        return {split: self._examples(files) for split, files in found.items()}

    def _examples(self, files: Files) -> Iterable[Example]:
        if ".gz" in (files.x.suffix, files.y.suffix):
            return self._unpack_and_read(files)
        return SizedExamples(read(files), check(files))

    def _unpack_and_read(self, files: Files) -> Iterator[Example]:
        with unpacked(files, self.scratch) as plain:
            yield from read(plain)


def find(raw_dir: Path) -> dict[str, Files]:
    """Returns the files of each split; a plain file is preferred to a packed one. Opens none.

    Raises:
        DataError: files are missing. Only the test split may be, and only as a whole.
    """
    if not raw_dir.is_dir():
        what = "not a folder" if raw_dir.exists() else "no such folder"
        raise DataError(f"{raw_dir}: {what}; set --config.data.raw_dir")
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
        raise _missing_error(raw_dir, missing)
    return found


def _plain_or_packed(plain: Path) -> Path | None:
    packed = plain.with_name(f"{plain.name}.gz")
    return plain if plain.is_file() else packed if packed.is_file() else None


def _missing_error(raw_dir: Path, names: list[str]) -> DataError:
    listed = ", ".join([str(raw_dir / names[0]), *names[1:]])
    are, their = ("is", "its") if len(names) == 1 else ("are", "their")
    hint = raw_files.likely_reason(
        raw_dir, names, lambda place: all(_plain_or_packed(place / name) for name in names)
    )
    return DataError(
        f"{listed} {are} missing, and so {are} {their} .gz; "
        + (hint or f"add what is missing: the published files come from {BASE_URL}")
    )


def fingerprint(raw_dir: Path) -> tuple[str, str]:
    """Returns two SHA-256 of the files of `find`: of their content, and of their times.

    The first covers the slides and, of images and labels, the size and the first 16 MiB, packed or
    not. The second covers the modification times of longer files.

    Raises:
        DataError: as `find`; or a packed file or a `_meta.csv` cannot be read.
    """
    content, times = hashlib.sha256(), hashlib.sha256()
    for split, files in find(raw_dir).items():
        for kind, path in (("x", files.x), ("y", files.y)):
            head, size = gzips.head(path, _HEAD)
            content.update(f"{split} {kind} {size} ".encode() + head)
            if len(head) == _HEAD:
                times.update(f"{split} {kind} {path.stat().st_mtime_ns}\n".encode())
        slides = [] if files.meta is None else _read_slides(files.meta)
        content.update("\n".join([split, *slides]).encode())
    return content.hexdigest(), times.hexdigest()


def download(folder: Path) -> dict[str, Files]:
    """Downloads the six packed files into a folder; complete ones are reused.

    Raises:
        DataError: names the URL that could not be downloaded or is not as published.
    """
    log.info("downloading PatchCamelyon, 8 GB, into %s", folder)
    log.info("it names no slides: they need --config.data.raw_dir with the _meta.csv files, too")
    published = downloads.read_checksums(Path(__file__).with_name("checksums.tsv"))
    # The small files come first: a connection that does not work shows early.
    paths = {
        (split, kind): downloads.download(published[f"{_STEM}{name}_{kind}.h5.gz"], folder)
        for kind in "yx"
        for split, name in SPLITS.items()
    }
    return {split: Files(paths[split, "x"], paths[split, "y"], None) for split in SPLITS}


@contextlib.contextmanager
def unpacked(files: Files, scratch: Path) -> Iterator[Files]:
    """Yields plain files: packed ones are unpacked into `scratch` and removed in the end.

    Raises:
        DataError: a packed file is corrupt, or `scratch` has too little space.
    """
    with gzips.unpacked((files.x, files.y), scratch) as plain:
        yield files._replace(x=plain.get(files.x, files.x), y=plain.get(files.y, files.y))


def check(files: Files) -> int:
    """Returns the number of patches of plain files; reads everything but the images.

    Raises:
        DataError: names the first file that does not have the published form.
    """
    with hdf5.open_dataset(files.x, "x") as images:
        _check_images(files.x, images)
        return len(_labels_and_slides(files, len(images))[0])


def read(files: Files) -> Iterator[Example]:
    """Yields the patches of plain files in their order; the id is the SHA-1 of the pixels.

    Raises:
        DataError: as `check`, before the first patch; or the images are corrupt.
    """
    with hdf5.open_dataset(files.x, "x") as images:
        _check_images(files.x, images)
        labels, slides = _labels_and_slides(files, len(images))
        for start in range(0, len(images), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            with hdf5.readable(files.x):
                patches = images[chunk]
            for image, label, slide in zip(patches, labels[chunk], slides[chunk], strict=True):
                yield Example(hashlib.sha1(image).hexdigest(), image, int(label), slide)


def _labels_and_slides(files: Files, count: int) -> tuple[np.ndarray, list[str]]:
    """Returns uint8[count] labels and as many slides; '' = not known."""
    labels = _read_labels(files.y, count, files.x.name)
    if files.meta is None:
        return labels, [""] * count
    slides = _read_slides(files.meta)
    named = sum(map(bool, slides))
    if not named == len(slides) == count:
        raise DataError(
            f"{files.meta} names the slides of {named} of {len(slides)} patches, and "
            f"{files.x.name} holds {count}; complete it, or remove it where slides are not known"
        )
    return labels, slides


def _read_labels(path: Path, count: int, images: str) -> np.ndarray:
    """Returns uint8[count] labels from numbers of any type and shape."""
    with hdf5.open_dataset(path, "y") as data:
        if data.dtype.kind not in "biuf":
            raise DataError(
                f"{path}: y is {hdf5.describe(data)}; write it as numbers that are 0 or 1"
            )
        if data.size != count:  # before they are read: a corrupt size may be huge
            raise DataError(
                f"{path} holds {data.size or 0} labels, {hdf5.describe(data)}, for the {count} "
                f"patches of {images}; each patch needs one, 0 or 1"
            )
        with hdf5.readable(path):
            labels = np.asarray(data[()]).reshape(-1)
    wrong = np.flatnonzero((labels != 0) & (labels != 1))
    if wrong.size:
        more = f", and {wrong.size - 1} more of {count} are wrong" if wrong.size > 1 else ""
        raise DataError(
            f"{path}: label {labels[wrong[0]]} of patch {wrong[0]} must be 0 or 1{more}; correct "
            "the labels"
        )
    return labels.astype(np.uint8)


def _read_slides(path: Path) -> list[str]:
    """Returns the slide of each patch; '' = not known."""
    return clean_column(read_csv(path, ("wsi",))["wsi"]).tolist()


def _check_images(path: Path, data: h5py.Dataset) -> None:
    """Refuses what is not uint8[n, 96, 96, 3] with n > 0, and says how to convert it."""
    shape: tuple[int, ...] = data.shape or ()  # None is HDF5's "null"
    if data.dtype == np.uint8 and shape[1:] == _SHAPE and shape[0]:
        return
    if shape[1:] == (_SHAPE[2], *_SHAPE[:2]):
        hint = "put the channels last"
    elif shape[1:] == (*_SHAPE[:2], 4):
        hint = "leave the fourth channel out"
    elif shape[1:] == _SHAPE and data.dtype.kind == "f":
        hint = "write whole numbers from 0 to 255"
    else:
        hint = "write it in this form"
    raise DataError(f"{path}: x is {hdf5.describe(data)}, and must be uint8[n, 96, 96, 3]: {hint}")
