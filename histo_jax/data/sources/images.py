"""The source `images`: a user's own images, listed by a table or by class folders.

`histo_jax.data.image_tables` describes the tables, `histo_jax.data.image_folders` the folders,
`histo_jax.data.image_files` the files.
"""

import collections
import functools
import hashlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from histo_jax.config import DataConfig
from histo_jax.data import raw_files
from histo_jax.data.example import SIZES, SPLITS, Example, ReadAgain, SizedExamples
from histo_jax.data.image_checks import check_labels, check_leaks, read_states
from histo_jax.data.image_files import (
    ImageFile,
    describe_conversions,
    read_image,
    read_images,
    read_size,
)
from histo_jax.data.image_folders import has_class_folders
from histo_jax.data.image_list import ImageList
from histo_jax.data.image_tables import TABLE, binary_labels, list_images
from histo_jax.data.read_ahead import unreadable_files
from histo_jax.errors import DataError
from histo_jax.registry import register_source
from histo_jax.run.files import expand

log = logging.getLogger("histo_jax")

# Files whose header is read for the size of all, and whose content the fingerprint covers.
_SAMPLE = 64
_CONTRADICTORY = "has the same pixels as an image with another label"


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
        self._contradictory: set[int] = set()  # rows of training images that are left out

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
        size = self._data.image_size or common_size(images)
        conversions: collections.Counter[str] = collections.Counter()
        splits: dict[str, Iterable[Example]] = {}
        rows = images.rows[~images.rows.index.isin(self._contradictory)]
        for split in filter(set(rows["split"]).__contains__, SPLITS):
            part = images._replace(rows=rows[rows["split"] == split])
            examples = self._read(split, part, size, conversions)
            splits[split] = SizedExamples(examples, len(part.rows))
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
        check_labels(checked, images.rows["label"])
        check_leaks(checked, self._data.allow_leak)
        return checked

    @functools.cached_property
    def _stats(self) -> pd.DataFrame:
        """Size and modification time of each file."""
        return read_states(self._images)

    def _read(
        self,
        split: str,
        images: ImageList,
        size: int,
        conversions: collections.Counter[str],
    ) -> Iterator[Example]:
        """Yields the images of a split; logs what was done to them.

        Args:
            split: its name.
            images: of this split.
            size: of all images.
            conversions: counts those of all splits.

        Raises:
            DataError: images cannot be used, unless they may be left out; or the system cannot read
                a file.
            ReadAgain: see `_check_repeats`.
        """
        skip = self._data.on_damaged == "skip" and split == "train"
        refused: dict[str, str] = {}
        first: dict[str, int] = {}
        repeats: dict[str, list[int]] = {}
        files = images.files()
        results = read_images(map(Path, files), self._data.image_size)
        columns = ("label", "slide", "patient", "path")
        rows = zip(*(images.rows[column].tolist() for column in columns), strict=True)
        for number, (path, row, result) in enumerate(zip(files, rows, results, strict=True)):
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
            if split == "train" and first.setdefault(name, number) != number:
                repeats.setdefault(name, [first[name]]).append(number)
                continue
            conversions.update(result.conversions)
            yield Example(name, result.pixels, *row)
        if refused and (not skip or len(refused) == len(files)):
            raise _refused_error(refused, len(files), split)
        self.corrupt |= refused
        if repeats:
            self._check_repeats(images, list(repeats.values()), skip)
        every = self._images.rows["split"]
        is_last = split == max(every, key=SPLITS.index)
        if is_last and (text := describe_conversions(conversions, size)):
            log.info("of %s images: %s", f"{len(every):,}", text)

    def _check_repeats(self, images: ImageList, repeats: list[list[int]], skip: bool) -> None:
        """Logs training images with the same pixels, of which the first is kept.

        Args:
            images: of the split.
            repeats: the numbers of the images with the same pixels, for each such group.
            skip: leave out all images of a group whose labels differ.

        Raises:
            DataError: labels of a group differ, and `skip` is false or nothing else would be left.
            ReadAgain: labels differed, and the images of these groups are left out from now on.
        """
        files, labels = images.files(), images.rows["label"].to_numpy()
        wrong = [group for group in repeats if len(set(labels[group])) > 1]
        if not wrong:
            count = sum(map(len, repeats)) - len(repeats)
            log.warning(
                "%d training images have the same pixels as an earlier one and are left out, the "
                "first is %s", count, files[repeats[0][1]],
            )  # fmt: skip
            return
        first = wrong[0][0]
        other = next(number for number in wrong[0] if labels[number] != labels[first])
        numbers = sorted(itertools.chain(*wrong))
        more = f" ({len(numbers):,} training images are like this)" if len(numbers) > 2 else ""
        problem = f"{files[first]} and {files[other]} have the same pixels and different labels"
        if not skip or len(numbers) == len(files):
            way_out = "" if skip else ", or leave all of them out by --config.data.on_damaged=skip"
            raise DataError(f"{problem}{more}: correct the labels{way_out}")
        log.warning("%s%s; all of them are left out", problem, more)
        self.corrupt |= {files[number]: _CONTRADICTORY for number in numbers}
        self._contradictory |= set(images.rows.index[numbers])
        raise ReadAgain

    def intact(self, corrupt: Mapping[str, str]) -> list[str]:
        """Returns those of the refused files that can be used by now."""
        paths = (Path(path) for path, reason in corrupt.items() if reason != _CONTRADICTORY)
        size = self._data.image_size
        return [str(path) for path in paths if isinstance(read_image(path, size), ImageFile)]


def common_size(images: ImageList) -> int:
    """Returns the size of most of a sample of files.

    Raises:
        DataError: patches cannot have this size.
    """
    paths = images.files()
    sizes = list(filter(None, map(read_size, map(Path, _spread(paths)))))
    # If the sample is corrupt, any other file tells the size; if all are, `splits` says so of each.
    sizes = sizes or [next(filter(None, map(read_size, map(Path, paths))), (SIZES[0], SIZES[0]))]
    (width, height), _ = collections.Counter(sizes).most_common(1)[0]
    if width == height and width in SIZES:
        return width
    near = min(SIZES, key=lambda size: abs(size - min(width, height)))
    raise DataError(
        f"{images.table or images.folder}: most images have {width}x{height} pixels, and must be "
        "square and a multiple of 32 from 32 to 512: scale them, as by "
        f"--config.data.image_size={near}"
    )


def _spread(paths: list[str]) -> list[str]:
    """Returns at most `_SAMPLE` of the paths, evenly spread."""
    count = min(_SAMPLE, len(paths))
    return [paths[k] for k in np.linspace(0, len(paths) - 1, count).round().astype(int)]


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
    if any(" pixels, not " in reason or " pixels, most " in reason for reason in refused.values()):
        fix += ", or scale all images by --config.data.image_size"
    if len(refused) < total and split == "train":
        fix += ", or leave them out by --config.data.on_damaged=skip"
    count = f"{len(refused):,} of {total:,} {split} images cannot be used: "
    return DataError(f"{count}{'; '.join(parts)}: {fix}")
