"""Reader of Kaggle's "Histopathologic Cancer Detection" folder.

Layout: `train/<id>.tif`, `test/<id>.tif`, `train_labels.csv` and `sample_submission.csv`, both
with the header `id,label`.
"""

import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from histo_jax.data.example import IMAGE_SIZE, UNLABELLED, Example
from histo_jax.errors import ExpectedError

# An id becomes part of a path, so nothing but the 40 digits of a SHA-1 may pass.
_ID = re.compile(r"[0-9a-f]{40}")
_FOLDERS = {"train": ("train", "train_labels.csv"), "test": ("test", "sample_submission.csv")}


def list_files(raw_dir: Path, split: str) -> list[tuple[Path, int]]:
    """Returns `(path, label)` of every patch that a split's CSV names, in the CSV's order.

    Opens no image. Test labels are `UNLABELLED`, whatever the CSV holds.

    Raises:
        ExpectedError: a folder or CSV is missing or empty, or a row is wrong.
    """
    folder, csv_name = raw_dir / _FOLDERS[split][0], raw_dir / _FOLDERS[split][1]
    if not raw_dir.is_dir():
        raise ExpectedError(f"{raw_dir}: no such folder; set --config.data.raw_dir")
    for path in (folder, csv_name):
        if not path.exists():
            raise ExpectedError(
                f"{path} is missing; unpack the competition's files into {raw_dir} as they come"
            )
    try:
        table = pd.read_csv(csv_name, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise ExpectedError(f"{csv_name} is no readable CSV ({_line(error)})") from None
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


def read(files: list[tuple[Path, int]]) -> Iterator[Example]:
    """Reads the images of `list_files`, in its order; the id is the file's name.

    Raises:
        ExpectedError: names the first file that is no 96x96 RGB TIFF.
    """
    for path, label in files:
        yield Example(id=path.stem, image=_read_image(path), label=label, slide="")


def fingerprint(raw_dir: Path) -> str:
    """Returns the SHA-256 of both CSVs, which name every patch by its content.

    Raises:
        ExpectedError: a CSV is missing.
    """
    digest = hashlib.sha256()
    for _, csv_name in _FOLDERS.values():
        try:
            digest.update((raw_dir / csv_name).read_bytes())
        except OSError as error:
            raise ExpectedError(f"{raw_dir / csv_name}: {_line(error)}; restore it") from None
    return digest.hexdigest()


def _read_image(path: Path) -> np.ndarray:
    try:
        # Pillow warns of a cut header before it raises.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=("TIFF",)) as image:
            mode, size = image.mode, image.size
            if (mode, size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE)):
                return np.asarray(image)
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise ExpectedError(
            f"{path} is no readable TIFF ({_line(error)}); download it again"
        ) from None
    raise ExpectedError(
        f"{path} is {size[0]}x{size[1]} {mode}, not {IMAGE_SIZE}x{IMAGE_SIZE} RGB; replace it"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
