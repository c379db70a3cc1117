"""Reader of Kaggle's "Histopathologic Cancer Detection" folder.

Layout: `train/<id>.tif`, `test/<id>.tif`, `train_labels.csv` and `sample_submission.csv`, both
with the header `id,label`.
"""

import concurrent.futures
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from histo_jax.data.example import IMAGE_SIZE, UNLABELLED, Example
from histo_jax.data.tables import read_csv
from histo_jax.errors import ExpectedError, one_line

_FORM = ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
# Images in memory at once: 14 MB.
_CHUNK = 512
# An id becomes part of a path, so nothing but the 40 digits of a SHA-1 may pass.
_ID = re.compile(r"[0-9a-f]{40}")
_FOLDERS = {"train": ("train", "train_labels.csv"), "test": ("test", "sample_submission.csv")}


def list_files(raw_dir: Path, split: str) -> list[tuple[Path, int]]:
    """Returns `(path, label)` of every patch that a split's CSV names, in the CSV's order.

    Opens no image. Test labels are `UNLABELLED`, whatever the CSV holds.

    Raises:
        ExpectedError: a folder or CSV is missing or empty, or a row is wrong.
    """
    folder, csv_name = _places(raw_dir, split)
    try:
        table = read_csv(csv_name)
    except (ValueError, OSError) as error:
        raise ExpectedError(f"{csv_name} is no readable CSV ({one_line(error)})") from None
    if list(table.columns) != ["id", "label"]:
        raise ExpectedError(f"{csv_name}: the header must be id,label; download it again")
    if table.empty:
        raise ExpectedError(f"{csv_name} names no patches; download it again")
    present = {path.name for path in folder.iterdir()}
    if not present:
        raise ExpectedError(f"{folder} is empty; unpack the competition's {split} images there")
    seen = set()
    files = []
    for line, (name, label) in enumerate(zip(table["id"], table["label"], strict=True), start=2):
        where = f"{csv_name}, line {line}"
        if not _ID.fullmatch(name):
            raise ExpectedError(f"{where}: id {name[:60]!r} is not 40 hex digits; mend the row")
        if name in seen:
            raise ExpectedError(f"{where}: id {name} stands there twice; remove one row")
        seen.add(name)
        if split == "train" and label not in ("0", "1"):
            raise ExpectedError(f"{where}: label {label[:60]!r} must be 0 or 1; mend the row")
        if f"{name}.tif" not in present:
            raise ExpectedError(
                f"{where}: {folder / name}.tif is missing; restore it or remove the row"
            )
        files.append((folder / f"{name}.tif", int(label) if split == "train" else UNLABELLED))
    return files


def raw_files(raw_dir: Path) -> list[Path]:
    """Returns every file that preparing depends on, the CSVs first.

    Raises:
        ExpectedError: a folder or CSV is missing.
    """
    places = [_places(raw_dir, split) for split in _FOLDERS]
    return [csv_name for _, csv_name in places] + [
        path for folder, _ in places for path in sorted(folder.glob("*.tif"))
    ]


def _places(raw_dir: Path, split: str) -> tuple[Path, Path]:
    """Folder and CSV of a split."""
    if not raw_dir.is_dir():
        raise ExpectedError(f"{raw_dir}: no such folder; set --config.data.raw_dir")
    folder, csv_name = raw_dir / _FOLDERS[split][0], raw_dir / _FOLDERS[split][1]
    for path, is_right in ((folder, folder.is_dir()), (csv_name, csv_name.is_file())):
        if not is_right:
            raise ExpectedError(
                f"{path} is missing; unpack the competition's files into {raw_dir} as they come"
            )
    return folder, csv_name


def read(files: list[tuple[Path, int]], skip: bool, damaged: dict[str, str]) -> Iterator[Example]:
    """Reads the images of `list_files`, in its order, and proves each: its name is its SHA-1.

    Args:
        files: path and label of each.
        skip: leave damaged files out; otherwise the rest is still checked, so that one error
            names all of them.
        damaged: filled with what is wrong, by path.

    Raises:
        ExpectedError: names the files that are no 96x96 RGB TIFF, or not the one they were.
    """
    # Reading, hashing and decoding release the interpreter's lock for most of their time.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        # Pillow warns of a cut header before it raises.
        warnings.filterwarnings("ignore", module="PIL")
        for start in range(0, len(files), _CHUNK):
            chunk = files[start : start + _CHUNK]
            images = pool.map(_read_image, [path for path, _ in chunk])
            for (path, label), image in zip(chunk, images, strict=True):
                if isinstance(image, str):
                    damaged[str(path)] = image
                elif skip or not damaged:
                    yield Example(id=path.stem, image=image, label=label, slide="")
    if damaged and not skip:
        listed = "; ".join(f"{path} {reason}" for path, reason in list(damaged.items())[:20])
        more = f" and {len(damaged) - 20} more" if len(damaged) > 20 else ""
        raise ExpectedError(
            f"{listed}{more}: download it again, or leave damaged training patches out by "
            "--config.data.on_damaged=skip"
        )


def _read_image(path: Path) -> np.ndarray | str:
    """The pixels, uint8[96, 96, 3], or what is wrong with the file."""
    try:
        with Image.open(path, formats=("TIFF",)) as image:
            mode, size = image.mode, image.size
            pixels = np.asarray(image) if (mode, size) == _FORM else None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        return f"is no readable TIFF ({one_line(error)})"
    if pixels is None:
        return f"is {size[0]}x{size[1]} {mode}, not {IMAGE_SIZE}x{IMAGE_SIZE} RGB"
    if hashlib.sha1(pixels.tobytes()).hexdigest() != path.stem:
        return "is damaged: its pixels' SHA-1 is not its name"
    return pixels
