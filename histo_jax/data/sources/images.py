"""The source `images`: a user's own images, listed by a table or by class folders.

`histo_jax.data.image_tables` describes both forms, `histo_jax.data.image_files` the files.
"""

import collections
import functools
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from histo_jax.config import DataConfig
from histo_jax.data import raw_files
from histo_jax.data.example import SIZES, UNLABELLED, Example, SizedExamples
from histo_jax.data.image_files import (
    ImageFile,
    describe_conversions,
    read_image,
    read_images,
    read_size,
)
from histo_jax.data.image_tables import (
    TABLE,
    ImageList,
    binary_labels,
    has_class_folders,
    list_images,
)
from histo_jax.data.names import identity
from histo_jax.data.read_ahead import unreadable_files
from histo_jax.errors import DataError
from histo_jax.registry import register_source
from histo_jax.run.files import expand

log = logging.getLogger("histo_jax")

_SPLITS = ("train", "validation", "test")
# Files whose header is read for the size of all, and whose content the fingerprint covers.
_SAMPLE = 64


@register_source("images")
class Images:
    """Own images.

    Args:
        data: `raw_dir` is their folder, `table` lists them; `positive`, `image_size`, `on_damaged`
            and `allow_leak`.
    """

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._folder = expand(data.raw_dir, "--config.data.raw_dir") if data.raw_dir else None
        self._table = expand(data.table, "--config.data.table") if data.table else None
        self.origin = str(self._table and self._table.absolute())
        self.corrupt: dict[str, str] = {}

    @staticmethod
    def recognizes(raw_dir: Path) -> bool:
        """Whether a folder has a table or class folders."""
        return (raw_dir / TABLE).exists() or has_class_folders(raw_dir)

    def fingerprint(self) -> str | None:
        """Returns a SHA-256 of what the table says, all files' sizes, and the content of some."""
        if self._folder is None and self._table is None:
            return None
        images, stats = self._images, self._stats
        digest = hashlib.sha256(f"{self._data.image_size}\n".encode())
        rows = images.rows[["path", "label", "slide", "patient", "split"]]
        for row, size in sorted(zip(rows.itertuples(index=False), stats["size"], strict=True)):
            digest.update(f"{list(row)} {size}\n".encode(errors="backslashreplace"))
        by_folder = sorted(images.files(), key=lambda path: path.split("/"))
        for path in map(Path, _spread(by_folder)):
            try:
                digest.update(path.read_bytes())
            except OSError as error:
                raise raw_files.unreadable(path, error) from None
        return digest.hexdigest()

    def modified(self) -> str | None:
        """Returns a hash of the modification times."""
        if self._folder is None and self._table is None:
            return None
        times = sorted(zip(self._images.rows["path"], self._stats["time"], strict=True))
        return hashlib.sha256(repr(times).encode(errors="backslashreplace")).hexdigest()

    def splits(self) -> dict[str, Iterable[Example]]:
        """Returns the images of each split."""
        if self._folder is None and self._table is None:
            raise DataError(
                "config.data.raw_dir is not set, and there are no prepared records: set "
                "--config.data.raw_dir to the folder of the images, or --config.data.table"
            )
        assert self._stats is not None  # all files are there
        images = self._images
        size = self._data.image_size or common_size(images.files())
        conversions: collections.Counter[str] = collections.Counter()
        splits: dict[str, Iterable[Example]] = {}
        for split in _SPLITS:
            rows = images.rows[images.rows["split"] == split]
            if len(rows):
                part = images._replace(rows=rows)
                splits[split] = SizedExamples(
                    self._read(split, part, size, conversions, len(images.rows)), len(rows)
                )
        return splits

    @functools.cached_property
    def _images(self) -> ImageList:
        """The images, with labels 0, 1 and -1."""
        images = list_images(self._folder, self._table)
        rows = images.rows.assign(
            label=binary_labels(images, self._data.positive),
            split=images.rows["split"].where(images.rows["split"] != "", "train"),
        )
        checked = images._replace(rows=rows)
        _check_labels(checked)
        _check_leaks(checked, self._data.allow_leak)
        return checked

    @functools.cached_property
    def _stats(self) -> pd.DataFrame:
        """Size and modification time of each file."""
        return _stat(self._images)

    def _read(
        self,
        split: str,
        images: ImageList,
        size: int,
        conversions: collections.Counter[str],
        total: int,
    ) -> Iterator[Example]:
        """Yields the images of a split; logs what was done to them.

        Args:
            split: its name.
            images: of this split.
            size: of all images.
            conversions: counts those of all splits.
            total: images of all splits.

        Raises:
            DataError: images cannot be used, unless they may be left out; or the system cannot read
                a file.
        """
        skip = self._data.on_damaged == "skip" and split == "train"
        refused: dict[str, str] = {}
        ids: set[str] = set()
        repeated: list[str] = []
        files = images.files()
        results = read_images(map(Path, files), self._data.image_size)
        columns = ("label", "slide", "patient", "path")
        rows = zip(*(images.rows[column].tolist() for column in columns), strict=True)
        for path, row, result in zip(files, rows, results, strict=True):
            if isinstance(result, Exception):
                raise unreadable_files(Path(path), result, results)
            if isinstance(result, ImageFile) and len(result.pixels) != size:
                result = (
                    f"is {len(result.pixels)}x{len(result.pixels)} pixels, most are {size}x{size}"
                )
            if isinstance(result, str):
                refused[path] = result
                continue
            if refused and not skip:
                continue  # read on, so that one error names all
            name = hashlib.sha1(result.pixels.data).hexdigest()
            if split == "train" and name in ids:
                repeated.append(path)
                continue
            ids.add(name)
            conversions.update(result.conversions)
            yield Example(name, result.pixels, *row)
        if refused and (not skip or len(refused) == len(files)):
            raise _refused_error(refused, len(files), split)
        self.corrupt |= refused
        if repeated:
            log.warning(
                "%d training images have the same pixels as an earlier one and are left out, the "
                "first is %s", len(repeated), repeated[0],
            )  # fmt: skip
        if files[-1] == self._last and (text := describe_conversions(conversions, size)):
            log.info("of %s images: %s", f"{total:,}", text)

    @functools.cached_property
    def _last(self) -> str:
        """The file that is read last."""
        images = self._images
        last = max(images.rows["split"], key=_SPLITS.index)
        return images._replace(rows=images.rows[images.rows["split"] == last]).files()[-1]

    def intact(self, corrupt: Iterable[str]) -> list[str]:
        """Returns those of the refused files that can be used by now."""
        size = self._data.image_size
        return [path for path in corrupt if isinstance(read_image(Path(path), size), ImageFile)]


def common_size(paths: list[str]) -> int:
    """Returns the size of most of a sample of files.

    Raises:
        DataError: patches cannot have this size.
    """
    sizes = collections.Counter(filter(None, map(read_size, map(Path, _spread(paths)))))
    (width, height), _ = sizes.most_common(1)[0] if sizes else ((SIZES[0], SIZES[0]), 0)
    if width == height and width in SIZES:
        return width
    near = min(SIZES, key=lambda size: abs(size - min(width, height)))
    raise DataError(
        f"{Path(paths[0]).parent}: the images have {width}x{height} pixels, and must be square and "
        f"a multiple of 32 from 32 to 512: scale them, as by --config.data.image_size={near}"
    )


def _spread(paths: list[str]) -> list[str]:
    """Returns at most `_SAMPLE` of the paths, evenly spread."""
    count = min(_SAMPLE, len(paths))
    return [paths[k] for k in np.linspace(0, len(paths) - 1, count).round().astype(int)]


def _check_labels(images: ImageList) -> None:
    """Refuses images without a label, and training images of one class."""
    rows = images.rows
    place = images.table or images.folder
    fix = "add it" if images.table else "move the images into a folder for each class"
    unlabelled = (rows["label"] == UNLABELLED) & (rows["split"] != "test")
    images.check(unlabelled, "the label is missing", fix, rows["path"])
    train = rows["label"][rows["split"] == "train"]
    if train.empty:
        raise DataError(f"{place} has no training images: add some, or correct the splits")
    if train.nunique() < 2:
        raise DataError(
            f"{place}: all {len(train):,} training images are of one class; add images of the other"
        )
    known = rows["label"][rows["split"] == "test"] != UNLABELLED
    if 0 < known.sum() < len(known):
        missing = (rows["label"] == UNLABELLED) & (rows["split"] == "test")
        images.check(
            missing, "a test image without a label among labelled ones",
            "give all labels of the test split, or none", rows["path"],
        )  # fmt: skip


def _check_leaks(images: ImageList, allow: bool) -> None:
    """Refuses patients and slides that two splits share."""
    for column in ("patient", "slide"):
        names = images.rows[column].map(
            {name: identity(name) for name in images.rows[column].unique()}
        )
        by_split = {split: names[images.rows["split"] == split] for split in _SPLITS}
        for first, second in itertools.combinations(_SPLITS, 2):
            shared = by_split[second][by_split[second].isin(set(by_split[first]) - {""})]
            if shared.empty:
                continue
            name = images.rows.at[shared.index[0], column]
            leak = (
                f"{images.place(shared.index[0])}: {column} {name!r} is in the {first} and the "
                f"{second} split, as are {shared.nunique() - 1} others"
            )
            if not allow:
                raise DataError(
                    f"{leak}: correct the split, or set --config.data.allow_leak=true and trust no "
                    f"{second} score"
                )
            log.warning("LEAK: %s; config.data.allow_leak is set", leak)


def _stat(images: ImageList) -> pd.DataFrame:
    """Returns `size` and `time` of each file; refuses missing ones."""
    found: dict[str, tuple[int, int]] = {}
    files = images.files()
    for folder in {os.path.dirname(path) for path in files}:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file():
                        status = entry.stat()
                        found[entry.path] = status.st_size, status.st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise raw_files.unreadable(Path(folder), error) from None
    paths = pd.Series(files, images.rows.index)
    missing = ~paths.isin(found)
    images.check(missing, "{} is missing", "restore the file, or remove the row", paths)
    return pd.DataFrame([found[path] for path in files], columns=["size", "time"])


def _refused_error(refused: dict[str, str], total: int, split: str) -> DataError:
    """Returns the error that names the files that cannot be used, grouped by the reason."""
    kinds: dict[str, list[str]] = {}
    for path, reason in refused.items():
        kinds.setdefault(re.sub(r"\d+", "0", reason), []).append(path)
    parts = []
    for paths in list(kinds.values())[:20]:
        more = f" ({len(paths):,} files are like this)" if len(paths) > 1 else ""
        parts.append(f"{paths[0]} {refused[paths[0]]}{more}")
    fix = "replace or remove them"
    if any("pixels" in reason for reason in refused.values()):
        fix += ", or scale all images by --config.data.image_size"
    if len(refused) < total and split == "train":
        fix += ", or leave them out by --config.data.on_damaged=skip"
    count = f"{len(refused):,} of {total:,} {split} images cannot be used: "
    return DataError(f"{count}{'; '.join(parts)}: {fix}")
