"""Lists the images in folders named after classes.

`train/CLASS/...`, `validation/CLASS/...` and `test/CLASS/...` or `test/...`, or without splits
`CLASS/...`, or images without a class.
"""

import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

import pandas as pd

from histo_jax import environment
from histo_jax.data.image_files import suffixes
from histo_jax.data.image_list import COLUMNS, SPLIT_WORDS, ImageList
from histo_jax.data.raw_files import unreadable
from histo_jax.errors import DataError

log = logging.getLogger("histo_jax")

# Files that Windows and macOS leave beside others; hidden ones start with a dot.
_DEBRIS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin"}


def has_class_folders(folder: Path) -> bool:
    """Whether a folder has class folders with images, with or without splits."""
    splits = [place for place in _subfolders(folder) if place.name.casefold() in SPLIT_WORDS]
    classes = [place for top in splits or [folder] for place in _subfolders(top)]
    return any(next(_walk(place, set()), None) for place in classes)


def list_folder(folder: Path, has_splits: bool = True) -> ImageList:
    """Returns the images below a folder, whose names tell their splits and classes.

    Args:
        folder: of the images.
        has_splits: only the folders of splits are listed, where there are some; false lists all.

    Raises:
        DataError: there are none, the name of one is not text, or a folder cannot be read.
    """
    others: set[str] = set()
    splits = {place: SPLIT_WORDS.get(place.name.casefold(), "") for place in _subfolders(folder)}
    splits = {place: split for place, split in splits.items() if split and has_splits}
    if splits and (ignored := _find_beside(folder, splits)):
        shown = ", ".join(ignored[:5]) + ", ..." * (len(ignored) > 5)
        log.warning("%s: images beside the folders of the splits are ignored: %s", folder, shown)
    rows = []
    for top, split in (splits or {folder: ""}).items():
        prefix = f"{top.name}/" if split else ""
        for path in _walk(top, others):
            below = path.split("/")
            if not split and below[0].casefold() in SPLIT_WORDS:
                below = below[1:]
            label = below[0] if len(below) > 1 else ""
            _check_name(folder, prefix + path)
            rows.append((prefix + path, label, "", "", split))
    if others:
        listed = ", ".join(sorted(others))
        message = f"{folder}: files that are no images are ignored: {listed}"
        log.info("%s", message, extra=environment.ONCE)
    if not rows:
        raise DataError(f"{folder} holds no images")
    return ImageList(pd.DataFrame(rows, columns=list(COLUMNS)), folder, None)


def _check_name(folder: Path, path: str) -> None:
    """Refuses a file whose name is not text, which no table can hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        name = os.fsencode(folder / path).decode(errors="backslashreplace")
        raise DataError(f"{name}: the name is not UTF-8; rename the file or its folder") from None


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_debris(path.name))


def _find_beside(folder: Path, splits: Collection[Path]) -> list[str]:
    """Returns the names of images, and of folders with images, beside the folders of the splits."""
    names = []
    for path in sorted(folder.iterdir()):
        if path in splits or _is_debris(path.name):
            continue
        is_image = path.suffix.lower() in suffixes() and path.is_file()
        if is_image or (path.is_dir() and next(_walk(path, set()), None)):
            names.append(path.name)
    return names


def _walk(folder: Path, others: set[str]) -> Iterator[str]:
    """Yields the image files below a folder in a fixed order; adds other files' suffixes.

    The paths are relative to the folder, with '/'.
    """
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_debris(name))
        folders[:] = [name for name in folders if not _is_loop(folder, Path(place, name))]
        prefix = "".join(f"{part}/" for part in Path(place).relative_to(folder).parts)
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes() and not _is_debris(name):
                yield prefix + name
            elif not _is_debris(name):
                others.add(suffix or name)


def _refuse(error: OSError) -> NoReturn:
    raise unreadable(Path(error.filename), error) from None


def _is_loop(top: Path, path: Path) -> bool:
    """Whether a folder below `top` is a link to one on the way to it, or above that."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    above = (folder for folder in path.parents if folder.is_relative_to(top))
    return any(folder.resolve().is_relative_to(target) for folder in above)


def _is_debris(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _DEBRIS
