"""Checks a list of images before the first one is read."""

import itertools
import logging
import os
from pathlib import Path

import pandas as pd

from histo_jax.data import groups, raw_files
from histo_jax.data.example import SPLITS, UNLABELLED
from histo_jax.data.image_list import ImageList
from histo_jax.errors import DataError

log = logging.getLogger("histo_jax")


def check_labels(images: ImageList, texts: pd.Series) -> None:
    """Refuses images without a label, and training images of one class.

    Args:
        images: with labels 0, 1 and -1.
        texts: their labels as written.

    Raises:
        DataError: names the first image, or what is missing.
    """
    rows = images.rows
    place = images.table or images.folder
    fix = "add it" if images.table else "move the images into a folder for each class"
    unlabelled = (rows["label"] == UNLABELLED) & (rows["split"] != "test")
    images.check(unlabelled & (texts == ""), "the label is missing", fix, rows["path"])
    images.check(
        unlabelled, "label {} means that it is not known", "write it, or rename the class", texts
    )
    train = rows["label"][rows["split"] == "train"]
    if train.empty:
        raise DataError(f"{place} has no training images: add some, or correct the splits")
    if train.nunique() < 2:
        raise DataError(
            f"{place}: all {len(train):,} training images are of one class; add images of the other"
        )


def check_leaks(images: ImageList, allow: bool) -> None:
    """Refuses patients and slides that two splits share.

    Args:
        images: their splits are known.
        allow: log them instead.

    Raises:
        DataError: names the first image of the later split.
    """
    for column in groups.UNITS:
        names = groups.identities(images.rows, column)
        by_split = {split: names[images.rows["split"] == split] for split in SPLITS}
        for first, second in itertools.combinations(SPLITS, 2):
            shared = by_split[second][by_split[second].isin(set(by_split[first]) - {""})]
            if shared.empty:
                continue
            name = images.rows.at[shared.index[0], column]
            more = f", as are {shared.nunique() - 1} more" if shared.nunique() > 1 else ""
            leak = (
                f"{images.place(shared.index[0])}: {column} {name!r} is in the {first} and the "
                f"{second} split{more}"
            )
            if not allow:
                raise DataError(
                    f"{leak}: correct the split, or set --config.data.allow_leak=true and trust no "
                    f"{second} score"
                )
            log.warning("LEAK: %s; config.data.allow_leak is set", leak)


def read_states(images: ImageList) -> pd.DataFrame:
    """Returns `size`, in bytes, and `time`, of modification in nanoseconds, of each file.

    Raises:
        DataError: files are missing; names the first, and their number.
    """
    found: dict[str, tuple[int, int]] = {}
    files = images.files()
    for folder in {os.path.dirname(path) for path in files}:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    # A link to itself raises.
                    is_there = not entry.is_symlink() or os.path.exists(entry.path)
                    if is_there and entry.is_file():
                        status = entry.stat()
                        found[entry.path] = status.st_size, status.st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise raw_files.unreadable(Path(folder), error) from None
    texts = pd.Series(files, images.rows.index)
    missing = ~texts.isin(found)
    existing = set(filter(os.path.exists, texts[missing]))
    fix = "remove the row" if images.table else "remove the link"
    images.check(texts.isin(existing), "{} is not a file", fix, texts)
    images.check(missing, "{} is missing", f"restore the file, or {fix}", texts)
    return pd.DataFrame([found[path] for path in files], columns=["size", "time"])
