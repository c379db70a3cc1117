"""Reader of Kaggle's "Histopathologic Cancer Detection" folder.

Layout: `train/<id>.tif`, `test/<id>.tif`, `train_labels.csv` with the columns `id` and `label`, and
`sample_submission.csv` with the column `id`; other columns and files are ignored.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from histo_jax.data import raw_files
from histo_jax.data.example import IMAGE_SIZE, UNLABELLED, Example
from histo_jax.data.tables import read_csv
from histo_jax.errors import UserError, one_line

_FORM = ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
# Images in memory at once: 14 MB.
_CHUNK = 512
# Bytes of a file that are looked at; a patch has 28 kB.
_LARGEST = 2**24
# An id becomes part of a path, so nothing but the 40 digits of a SHA-1 may pass.
_ID = re.compile(r"[0-9a-f]{40}")
_LABELS = {"false": 0, "true": 1}
_FOLDERS = {"train": ("train", "train_labels.csv"), "test": ("test", "sample_submission.csv")}
# What Pillow raises on damaged files; anything else is a bug.
_DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip
_OTHER_PIXELS = "is damaged: its pixels' SHA-1 is not its name"


def list_files(raw_dir: Path, split: str) -> list[tuple[Path, int]]:
    """Returns `(path, label)` of every patch that a split's CSV names, in the CSV's order.

    Opens no image. Test labels are `UNLABELLED`, whatever the CSV holds.

    Raises:
        UserError: a folder or CSV is missing or empty, a row is wrong, or a file is missing.
    """
    folder, csv_name = _places(raw_dir, split)
    rows = _rows(csv_name, split)
    present = {path.name for path in folder.iterdir()}
    missing = {name: line for line, name, _ in rows if f"{name}.tif" not in present}
    if missing:
        raise _missing(folder, csv_name, missing, len(rows))
    return [(folder / f"{name}.tif", label) for _, name, label in rows]


def fingerprint(raw_dir: Path) -> str:
    """Returns a SHA-256 of the ids and labels that the CSVs name, in any order; opens no image.

    An id is the SHA-1 of its file's pixels, so nothing else about a file matters.

    Raises:
        UserError: as `list_files`, but for missing images.
    """
    digest = hashlib.sha256()
    for split in _FOLDERS:
        named = sorted(
            f"{name} {label}" for _, name, label in _rows(_places(raw_dir, split)[1], split)
        )
        digest.update("\n".join([split, *named, ""]).encode())
    return digest.hexdigest()


def clean_id(text: str) -> str:
    """Returns an id as files and records have it: in lower case, without a suffix."""
    return text.lower().removesuffix(".tif")


def _places(raw_dir: Path, split: str) -> tuple[Path, Path]:
    """Folder and CSV of a split, once all of the competition's are there."""
    if not raw_dir.is_dir():
        what = "is no folder" if raw_dir.exists() else "no such folder"
        raise UserError(f"{raw_dir}: {what}; set --config.data.raw_dir")
    missing = _lacks(raw_dir)
    if missing:
        hint = raw_files.likely_reason(raw_dir, missing, lambda place: not _lacks(place))
        listed = ", ".join([str(raw_dir / missing[0]), *missing[1:]])
        raise UserError(
            f"{listed} {'is' if len(missing) == 1 else 'are'} missing; "
            + (hint or f"unpack the competition's files into {raw_dir} as they come")
        )
    folder, csv_name = _FOLDERS[split]
    return raw_dir / folder, raw_dir / csv_name


def _lacks(raw_dir: Path) -> list[str]:
    lacking = []
    for folder, csv_name in _FOLDERS.values():
        lacking += [] if (raw_dir / folder).is_dir() else [folder]
        lacking += [] if (raw_dir / csv_name).is_file() else [csv_name]
    return lacking


def _rows(csv_name: Path, split: str) -> list[tuple[int, str, int]]:
    """Returns `(line, id, label)` of each row.

    Raises:
        UserError: the CSV cannot be read, or rows are wrong: the first, and how many.
    """
    table = read_csv(csv_name, ("id", "label") if split == "train" else ("id",))
    if table.empty:
        raise UserError(f"{csv_name} names no patches; restore it or download it again")
    ids = table["id"].map(clean_id)
    wrong = ~ids.map(lambda name: bool(_ID.fullmatch(name)))
    _refuse(csv_name, wrong, table["id"], "id {!r} is not 40 hex digits")
    _refuse(csv_name, ids.duplicated(), ids, "id {} stands there twice")
    labels = pd.Series(UNLABELLED, table.index)
    if split == "train":
        labels = table["label"].map({text: _label(text) for text in table["label"].unique()})
        _refuse(csv_name, labels.isna(), table["label"], "label {!r} must be 0 or 1")
    return list(zip(table.index.tolist(), ids.tolist(), labels.astype(int).tolist(), strict=True))


def _refuse(csv_name: Path, wrong: pd.Series, cells: pd.Series, what: str) -> None:
    """Raises where bool[n] `wrong` marks rows, by line: names the first and counts the others."""
    lines = wrong.index[wrong]
    if not len(lines):
        return
    said = what.format(cells[lines[0]][:60])
    remedy = "remove one row" if "twice" in what else "mend the row"
    if len(lines) > 1:
        remedy = f"{len(lines)} of {len(wrong)} rows are like this, {remedy.split()[0]} them"
    raise UserError(f"{csv_name}, line {lines[0]}: {said}; {remedy}")


def _label(text: str) -> int | None:
    """Returns 0 or 1 as tables write them (1, 1.0, True), or None."""
    with contextlib.suppress(ValueError):
        number = float(text)
        return int(number) if number in (0, 1) else None
    return _LABELS.get(text.lower())


def _missing(folder: Path, csv_name: Path, missing: dict[str, int], named: int) -> UserError:
    """Returns the error for files that are missing: how many, and where they lie instead.

    Args:
        folder: where they should be.
        csv_name: what names them.
        missing: line of each id.
        named: how many files `csv_name` names.
    """
    name, line = next(iter(missing.items()))
    where = f"{csv_name}, line {line}: {folder / name}.tif is missing"
    remedy = "restore it or remove the row"
    if len(missing) > 1:
        where = f"{len(missing)} of {named} files that {csv_name} names are missing, the first "
        where += f"{folder / name}.tif (line {line})"
        remedy = "restore them or remove the rows"
    if not any(folder.iterdir()):
        where = f"{folder} is empty, and {csv_name.name} names {named} files"
        remedy = f"unpack the competition's {folder.name} images there"
    count, example = raw_files.find_stems(folder.parent, missing)
    if example is not None:
        act = "move or rename" if example.suffix.lower().startswith(".tif") else "convert"
        remedy = f"{count} of them lie elsewhere, as {example}: {act} them to {folder}/ID.tif"
    elif len(missing) > 1:
        remedy = raw_files.archives(folder.parent) or raw_files.archives(folder) or remedy
    return UserError(f"{where}; {remedy}")


def read(files: list[tuple[Path, int]], skip: bool, damaged: dict[str, str]) -> Iterator[Example]:
    """Reads the images of `list_files`, in its order, and proves each: its name is its SHA-1.

    Args:
        files: path and label of each.
        skip: leave damaged files out, unless all are; otherwise the rest is still checked, so that
            one error names all of them.
        damaged: filled with what is wrong, by path.

    Raises:
        UserError: names the files that are no 96x96 RGB TIFF, or not the one they were; or one
            that the system cannot read, which is no damage and never left out.
    """
    # Reading, hashing and decoding release the interpreter's lock for most of their time.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        # Pillow warns of a cut header before it raises.
        warnings.filterwarnings("ignore", module="PIL")
        for start in range(0, len(files), _CHUNK):
            chunk = files[start : start + _CHUNK]
            images = list(pool.map(_read_image, [path for path, _ in chunk]))
            _refuse_unreadable(chunk, images)
            for (path, label), image in zip(chunk, images, strict=True):
                if isinstance(image, str):
                    damaged[str(path)] = image
                elif isinstance(image, np.ndarray) and (skip or not damaged):
                    yield Example(id=path.stem, image=image, label=label, slide="")
    if damaged and (not skip or len(damaged) == len(files)):
        raise _damaged(files, damaged)


def restored(damaged: Iterable[str]) -> list[str]:
    """Returns the paths of files that `read` has left out and that are whole by now."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        return [path for path in damaged if isinstance(_read_image(Path(path)), np.ndarray)]


def _refuse_unreadable(
    chunk: list[tuple[Path, int]], images: Sequence[np.ndarray | str | Exception]
) -> None:
    failed = [
        (path, image)
        for (path, _), image in zip(chunk, images, strict=True)
        if isinstance(image, Exception)
    ]
    if failed:
        more = f", nor can {len(failed) - 1} more of {len(chunk)}" if len(failed) > 1 else ""
        raise raw_files.unreadable(*failed[0], also=more)


def _damaged(files: list[tuple[Path, int]], damaged: dict[str, str]) -> UserError:
    """Returns the error that names the damaged ones of `files`, with what is wrong, by path."""
    count = f"{len(damaged)} of {len(files)} files are damaged: " if len(damaged) > 1 else ""
    listed = "; ".join(f"{path} {reason}" for path, reason in list(damaged.items())[:20])
    more = f" and {len(damaged) - 20} more" if len(damaged) > 20 else ""
    remedy = "restore them, or download them again" if count else "restore it, or download it again"
    if set(damaged.values()) == {_OTHER_PIXELS} and len(damaged) == len(files) > 1:
        remedy = "were all renamed, or written again with loss? Restore them"
    elif len(damaged) < len(files) and files[0][1] != UNLABELLED:
        remedy += ", or leave damaged training patches out by --config.data.on_damaged=skip"
    return UserError(f"{count}{listed}{more}: {remedy}")


def _read_image(path: Path) -> np.ndarray | str | Exception:
    """The pixels, uint8[96, 96, 3]; or what is wrong with the file; or why it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST)
    except OSError as error:
        return error
    # From memory, so that no error of the disk is taken for one of the file.
    try:
        with Image.open(io.BytesIO(content), formats=("TIFF",)) as image:
            mode, size = image.mode, image.size
            pixels = np.asarray(image) if (mode, size) == _FORM else None
    except MemoryError as error:
        return error
    except _DAMAGE as error:
        said = one_line(error).partition(" <_io.")[0] if content else "it is empty"
        return f"is no readable TIFF ({said})"
    if pixels is None:
        return f"is {size[0]}x{size[1]} {mode}, not {IMAGE_SIZE}x{IMAGE_SIZE} RGB"
    if hashlib.sha1(pixels.tobytes()).hexdigest() != path.stem:
        return _OTHER_PIXELS
    return pixels
