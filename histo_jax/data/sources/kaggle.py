"""The source `kaggle`: the folder of Kaggle's "Histopathologic Cancer Detection".

Layout: `train/<id>.tif`, `test/<id>.tif`, `train_labels.csv` with the columns `id` and `label`, and
`sample_submission.csv` with the column `id`; other columns and files are ignored.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from histo_jax.config import DataConfig
from histo_jax.data import raw_files
from histo_jax.data.example import UNLABELLED, Example, SizedExamples
from histo_jax.data.image_files import CORRUPTION
from histo_jax.data.read_ahead import read_ahead, unreadable_files
from histo_jax.data.tables import parse_label, read_csv
from histo_jax.errors import DataError, one_line
from histo_jax.registry import register_source
from histo_jax.run.files import expand

_SIZE = 96  # height and width of a patch, pixels
_FORMAT = ("RGB", (_SIZE, _SIZE))
# Bytes that are read of a file; a patch has 28 kB.
_LARGEST = 2**24
# An id becomes part of a path, so nothing but the 40 digits of a SHA-1 may pass.
_ID = re.compile(r"[0-9a-f]{40}")
_FOLDERS = {"train": ("train", "train_labels.csv"), "test": ("test", "sample_submission.csv")}
_OTHER_PIXELS = "is corrupt: the SHA-1 of its pixels is not its name"


@register_source("kaggle")
class Kaggle:
    """The competition's files.

    Args:
        data: `raw_dir` is the folder; `on_damaged` is what happens to corrupt training patches.
    """

    # PatchCamelyon's README: 0.243 um at 40x, undersampled to 10x; the label is of the centre.
    classes = ("no tumour", "tumour")
    image_size, label_region, mpp = _SIZE, 32, 0.972

    def __init__(self, data: DataConfig) -> None:
        self._raw_dir = expand(data.raw_dir, "--config.data.raw_dir") if data.raw_dir else None
        self._skip = data.on_damaged == "skip"
        self.corrupt: dict[str, str] = {}

    @staticmethod
    def recognizes(raw_dir: Path) -> bool:
        """Whether a folder has the competition's labels."""
        return (raw_dir / "train_labels.csv").exists()

    def fingerprint(self) -> str | None:
        """Returns `fingerprint` of the folder, None without one."""
        return fingerprint(self._raw_dir) if self._raw_dir else None

    def splits(self) -> dict[str, SizedExamples]:
        """Returns the training patches and, without labels, the test patches."""
        if self._raw_dir is None:
            raise DataError(
                "config.data.raw_dir is not set, and there are no prepared records: set "
                "--config.data.raw_dir to the folder of the competition's files"
            )
        # Both splits are listed before the first image is read: a mistake in the test CSV must
        # not show only after minutes of work.
        train, test = (list_files(self._raw_dir, split) for split in ("train", "test"))
        # A submission needs every test patch, so none of them is left out.
        return {
            "train": SizedExamples(read(train, self._skip, self.corrupt), len(train)),
            "test": SizedExamples(read(test, False, {}), len(test)),
        }

    def intact(self, corrupt: Iterable[str]) -> list[str]:
        """Returns those of the corrupt files that can be read by now."""
        return intact(corrupt)


def list_files(raw_dir: Path, split: str) -> list[tuple[Path, int]]:
    """Returns `(path, label)` of every patch that a split's CSV names, in the CSV's order.

    Opens no image. Test labels are `UNLABELLED`, whatever the CSV holds.

    Raises:
        DataError: a folder or CSV is missing or empty, a row is wrong, or a file is missing.
    """
    folder, csv_path = _locate(raw_dir, split)
    rows = _read_rows(csv_path, split)
    present = {path.name for path in folder.iterdir()}
    missing = {name: line for line, name, _ in rows if f"{name}.tif" not in present}
    if missing:
        raise _missing_error(folder, csv_path, missing, len(rows))
    return [(folder / f"{name}.tif", label) for _, name, label in rows]


def fingerprint(raw_dir: Path) -> str:
    """Returns a SHA-256 of the ids and labels in the CSVs, in any order; opens no image.

    An id is the SHA-1 of the pixels, so nothing else about a file matters.

    Raises:
        DataError: as `list_files`, but for missing images.
    """
    digest = hashlib.sha256()
    for split in _FOLDERS:
        rows = sorted(
            f"{name} {label}" for _, name, label in _read_rows(_locate(raw_dir, split)[1], split)
        )
        digest.update("\n".join([split, *rows, ""]).encode())
    return digest.hexdigest()


def clean_id(text: str) -> str:
    """Returns an id as in the records: in lower case, without the suffix of a file."""
    return text.lower().removesuffix(".tif")


def _locate(raw_dir: Path, split: str) -> tuple[Path, Path]:
    """Returns folder and CSV of a split; checks that those of all splits exist."""
    if not raw_dir.is_dir():
        what = "not a folder" if raw_dir.exists() else "no such folder"
        raise DataError(f"{raw_dir}: {what}; set --config.data.raw_dir")
    missing = _missing_names(raw_dir)
    if missing:
        hint = raw_files.likely_reason(raw_dir, missing, lambda place: not _missing_names(place))
        listed = ", ".join([str(raw_dir / missing[0]), *missing[1:]])
        raise DataError(
            f"{listed} {'is' if len(missing) == 1 else 'are'} missing; "
            + (hint or f"unpack the competition's archive into {raw_dir}")
        )
    folder, csv_name = _FOLDERS[split]
    return raw_dir / folder, raw_dir / csv_name


def _missing_names(raw_dir: Path) -> list[str]:
    missing = []
    for folder, csv_name in _FOLDERS.values():
        missing += [] if (raw_dir / folder).is_dir() else [folder]
        missing += [] if (raw_dir / csv_name).is_file() else [csv_name]
    return missing


def _read_rows(csv_path: Path, split: str) -> list[tuple[int, str, int]]:
    """Returns `(line, id, label)` of each row.

    Raises:
        DataError: the CSV cannot be read, or rows are wrong; names the first one, and their number.
    """
    table = read_csv(csv_path, ("id", "label") if split == "train" else ("id",))
    if table.empty:
        raise DataError(f"{csv_path} lists no patches; restore it or download it again")
    ids = table["id"].map(clean_id)
    wrong = ~ids.map(lambda name: bool(_ID.fullmatch(name)))
    _check_rows(csv_path, wrong, table["id"], "id {!r} is not 40 hex digits", "correct")
    _check_rows(csv_path, ids.duplicated(), ids, "duplicate id {}", "remove")
    labels = pd.Series(UNLABELLED, table.index)
    if split == "train":
        labels = table["label"].map({text: parse_label(text) for text in table["label"].unique()})
        _check_rows(csv_path, labels.isna(), table["label"], "label {!r} must be 0 or 1", "correct")
    return list(zip(table.index.tolist(), ids.tolist(), labels.astype(int).tolist(), strict=True))


def _check_rows(csv_path: Path, wrong: pd.Series, cells: pd.Series, problem: str, fix: str) -> None:
    """Refuses rows of a CSV.

    Args:
        csv_path: the file.
        wrong: bool[n], by line.
        cells: the cell that is wrong, by line.
        problem: what is wrong; `{}` stands for the cell.
        fix: what to do with the row, as in 'remove'.
    """
    lines = wrong.index[wrong]
    if not len(lines):
        return
    count = f" ({len(lines)} of {len(wrong)} rows are like this)" if len(lines) > 1 else ""
    rows = "these rows" if len(lines) > 1 else "the row"
    raise DataError(
        f"{csv_path}, line {lines[0]}: {problem.format(cells[lines[0]][:60])}{count}; {fix} {rows}"
    )


def _missing_error(folder: Path, csv_path: Path, missing: dict[str, int], listed: int) -> DataError:
    """Returns the error for missing files: their number, and where they are instead.

    Args:
        folder: where they should be.
        csv_path: the CSV that lists them.
        missing: line of each id.
        listed: number of files that the CSV lists.
    """
    name, line = next(iter(missing.items()))
    problem = f"{csv_path}, line {line}: {folder / name}.tif is missing"
    fix = "restore it or remove the row"
    if len(missing) > 1:
        problem = (
            f"{len(missing)} of {listed} files that {csv_path} lists are missing, the first is "
            f"{folder / name}.tif (line {line})"
        )
        fix = "restore them or remove the rows"
    if not any(folder.iterdir()):
        problem = f"{folder} is empty, and {csv_path.name} lists {listed} files"
        fix = f"unpack the competition's {folder.name} images there"
    count, example = raw_files.find_stems(folder.parent, missing)
    if example is not None:
        action = "move or rename" if example.suffix.lower().startswith(".tif") else "convert"
        fix = f"{count} of them are elsewhere, as {example}: {action} them to {folder}/ID.tif"
    elif len(missing) > 1:
        fix = raw_files.archives(folder.parent) or raw_files.archives(folder) or fix
    return DataError(f"{problem}; {fix}")


def read(files: list[tuple[Path, int]], skip: bool, corrupt: dict[str, str]) -> Iterator[Example]:
    """Yields the patches of `list_files` in its order; checks that a file's name is its SHA-1.

    Args:
        files: path and label of each patch.
        skip: leave corrupt files out, unless all are corrupt. Otherwise the remaining files are
            still checked, so that one error names all corrupt ones.
        corrupt: filled with the reason for each corrupt file, by path.

    Raises:
        DataError: names the files that are not a 96x96 RGB TIFF, or whose pixels have changed; or
            a file that the system cannot read, which is not corrupt and never left out.
    """
    results = read_ahead(_read_image, [path for path, _ in files])
    for (path, label), image in zip(files, results, strict=True):
        if isinstance(image, Exception):
            raise unreadable_files(path, image, results)
        if isinstance(image, str):
            corrupt[str(path)] = image
        elif skip or not corrupt:
            yield Example(id=path.stem, image=image, label=label, slide="")
    if corrupt and (not skip or len(corrupt) == len(files)):
        raise _corrupt_error(files, corrupt)


def intact(corrupt: Iterable[str]) -> list[str]:
    """Returns the paths of files that `read` has left out and that can be read by now."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        return [path for path in corrupt if isinstance(_read_image(Path(path)), np.ndarray)]


def _corrupt_error(files: list[tuple[Path, int]], corrupt: dict[str, str]) -> DataError:
    """Returns the error that names the corrupt ones of `files`, with the reason, by path."""
    count = f"{len(corrupt)} of {len(files)} files are corrupt: " if len(corrupt) > 1 else ""
    listed = "; ".join(f"{path} {reason}" for path, reason in list(corrupt.items())[:20])
    more = f" and {len(corrupt) - 20} more" if len(corrupt) > 20 else ""
    fix = "restore them, or download them again" if count else "restore it, or download it again"
    if set(corrupt.values()) == {_OTHER_PIXELS} and len(corrupt) == len(files) > 1:
        fix = "were all files renamed, or saved with lossy compression? Restore them"
    elif len(corrupt) < len(files) and files[0][1] != UNLABELLED:
        fix += ", or leave corrupt training patches out by --config.data.on_damaged=skip"
    return DataError(f"{count}{listed}{more}: {fix}")


def _read_image(path: Path) -> np.ndarray | str | Exception:
    """Returns uint8[96, 96, 3], or why the file is corrupt, or why the system cannot read it."""
    try:
        content = raw_files.read_content(path, _LARGEST)
    except OSError as error:
        return error
    # From memory, so that an error of the disk is not taken for one of the file.
    try:
        with Image.open(io.BytesIO(content), formats=("TIFF",)) as image:
            mode, size = image.mode, image.size
            pixels = np.asarray(image) if (mode, size) == _FORMAT else None
    except MemoryError as error:
        return error
    except CORRUPTION as error:
        reason = one_line(error).partition(" <_io.")[0] if content else "it is empty"
        return f"is not a readable TIFF ({reason})"
    if pixels is None:
        return f"is {size[0]}x{size[1]} {mode}, not {_SIZE}x{_SIZE} RGB"
    if hashlib.sha1(pixels.data).hexdigest() != path.stem:
        return _OTHER_PIXELS
    return pixels
