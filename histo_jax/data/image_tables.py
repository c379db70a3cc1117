"""Lists the images of a user: from a table, or from folders named after classes.

A table is a CSV, a TSV or a Parquet file with one row per image. Its columns are found by their
names, in any case, with spaces, dashes or dots for underscores:

- `path`, relative to the folder of the images, or absolute: path, file_path, filepath, image_path,
  img_path, file_name, filename, image_name, image_file, file, image, img
- `label`, a class: label, labels, class, class_name, target, category, y
- `slide`: slide, slide_id, slide_name, slideid, wsi, wsi_id, wsi_name
- `patient`: patient, patient_id, patientid, case, case_id, subject, subject_id
- `split`: split, fold, subset, partition, set. Its words are train or training; validation, valid,
  val or dev; test or testing

Of several names the first in this list is used. All but `path` may be missing, and further columns
are ignored.

Folders: `train/CLASS/...`, `validation/CLASS/...` and `test/CLASS/...` or `test/...`, or without
splits `CLASS/...`, or images without a class.
"""

import functools
import logging
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from histo_jax.data.image_files import suffixes
from histo_jax.data.names import UNKNOWN, clean_column, identity
from histo_jax.data.raw_files import is_system_error, unreadable
from histo_jax.data.tables import parse_label, read_columns, shorten
from histo_jax.errors import DataError, one_line

log = logging.getLogger("histo_jax")

TABLE = "images.csv"
SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
ALIASES = {
    "path": (
        "path", "file_path", "filepath", "image_path", "img_path", "file_name", "filename",
        "image_name", "image_file", "file", "image", "img",
    ),
    "label": ("label", "labels", "class", "class_name", "target", "category", "y"),
    "slide": ("slide", "slide_id", "slide_name", "slideid", "wsi", "wsi_id", "wsi_name"),
    "patient": (
        "patient", "patient_id", "patientid", "case", "case_id", "subject", "subject_id",
    ),
    "split": ("split", "fold", "subset", "partition", "set"),
}  # fmt: skip
_TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
# A class may be called 'none', 'unknown' or '-'; these words stand for an empty cell.
_NO_LABEL = UNKNOWN - {"-", "--", "none", "unknown", "nil", "missing", "not known", "undefined"}
# Files that Windows and macOS leave beside others; hidden ones start with a dot.
_DEBRIS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin"}


class ImageList(NamedTuple):
    """Images of a table or of folders; no file was opened.

    Attributes:
        rows: columns `path` (relative to `folder`, with '/', or absolute), `label`, `slide`,
            `patient` and `split` (a value of `SPLITS`); text, '' = not known. The index is the line
            or row of the table, or counts the files of folders.
        folder: of relative paths.
        table: the table; None = the images are those of a folder.
    """

    rows: pd.DataFrame
    folder: Path
    table: Path | None

    def files(self) -> list[Path]:
        """Returns the file of each row."""
        return [self.folder / path for path in self.rows["path"]]

    def place(self, row: Any) -> str:
        """Returns where an image is listed, for messages.

        Args:
            row: from the index of `rows`.
        """
        if self.table is None:
            return str(self.folder / str(self.rows.at[row, "path"]))
        return f"{self.table}, {'row' if self.table.suffix == '.parquet' else 'line'} {row}"

    def check(self, wrong: pd.Series, problem: str, fix: str, cells: pd.Series) -> None:
        """Refuses rows: names the first, and their number.

        Args:
            wrong: bool[n], by row.
            problem: what is wrong; `{}` stands for the cell.
            fix: what to do.
            cells: the cell that is wrong, by row.

        Raises:
            DataError: a row is wrong.
        """
        rows = wrong.index[wrong]
        if not len(rows):
            return
        what = "images" if self.table is None else "rows"
        count = f" ({len(rows):,} of {len(wrong):,} {what} are like this)" if len(rows) > 1 else ""
        cell = repr(cells[rows[0]])
        cell = cell if len(cell) < 100 else f"{cell[:80]}..."
        raise DataError(f"{self.place(rows[0])}: {problem.format(cell)}{count}; {fix}")


def list_images(
    folder: Path | None, table: Path | None = None, has_splits: bool = True
) -> ImageList:
    """Returns the images of a table or a folder.

    Args:
        folder: of the images; may itself be a table. None = that of the table.
        table: None = `images.csv` in the folder, or else the folders in it.
        has_splits: only the folders of splits are listed, where there are some; false lists all.

    Raises:
        DataError: the folder or table cannot be read, or rows of the table are wrong; names the
            first one, and their number.
    """
    if folder is not None and table is None and not folder.is_dir():
        if not folder.exists():
            raise DataError(f"{folder}: no such file or folder; give the folder of the images")
        folder, table = None, folder
    if folder is None:
        assert table is not None
        folder = table.parent
    if table is None and (folder / TABLE).is_file():
        table = folder / TABLE
    return _list_folders(folder, has_splits) if table is None else read_table(table, folder)


def binary_labels(images: ImageList, positive: str | None) -> pd.Series:
    """Returns the label of each image: 1, 0, or -1 where it is not known.

    Args:
        images: their `label` is 0 or 1 as tables write them, unless `positive` is given.
        positive: name of the class whose label is 1; the other class has 0.

    Raises:
        DataError: there are more than two classes; or labels are not 0 and 1 and `positive` names
            none of the classes.
    """
    texts = images.rows["label"]
    keys = {text: _class(text) for text in texts.unique()}
    labels = {text: parse_label(key) if key else -1 for text, key in keys.items()}
    if positive is None and None not in labels.values():
        return texts.map(labels).astype(int)
    spellings = {key: text for text, key in reversed(keys.items()) if key}
    found = sorted(spellings.values())
    listed = f"{', '.join(map(repr, found[:10]))}{', ...' if len(found) > 10 else ''}"
    place = images.table or images.folder
    if len(found) > 2:
        raise DataError(
            f"{place} has {len(found)} classes, {listed}; two are supported: merge the others into "
            "one of them, or leave them out"
        )
    if positive is None:
        raise DataError(
            f"{place} has the classes {listed}; name the positive one by "
            "--config.data.positive=CLASS"
        )
    if found and _class(positive) not in spellings:
        raise DataError(
            f"config.data.positive = {positive!r} is no class of {place}, which has {listed}"
        )
    labels = {text: int(key == _class(positive)) if key else -1 for text, key in keys.items()}
    return texts.map(labels).astype(int)


def _class(text: str) -> str:
    """Returns a name that is equal for all spellings of a class; '' = not known."""
    return "" if text.casefold() in _NO_LABEL else identity(text) or text.casefold()


# --- tables ---------------------------------------------------------------------------------------


def read_table(
    path: Path,
    folder: Path,
    aliases: Mapping[str, tuple[str, ...]] = ALIASES,
    what: str = "images",
) -> ImageList:
    """Returns the images, or the slides, of a table.

    Args:
        path: of the table.
        folder: of relative paths.
        aliases: the names that each column may have; those of `ALIASES`, and others.
        what: is listed, for messages.

    Raises:
        DataError: see `list_images`.
    """
    columns = functools.partial(_columns, path, aliases, what)
    if path.suffix.lower() not in _TABLE_SUFFIXES:
        raise DataError(
            f"{path} is no table that can be read: save it as {', '.join(_TABLE_SUFFIXES)}, or "
            "give a folder"
        )
    if path.suffix.lower() == ".parquet":
        found = _read_parquet(path, columns)
    else:
        found = read_columns(path, columns)
    if found.empty:
        raise DataError(f"{path} lists no {what}; add rows")
    rows = found.reindex(columns=list(aliases), fill_value="")
    images = ImageList(rows, folder, path)
    images.check(rows["path"] == "", "the path is missing{:.0}", "add it", rows["path"])
    rows["split"] = _clean_splits(images)
    rows["slide"], rows["patient"] = clean_column(rows["slide"]), clean_column(rows["patient"])
    paths = rows["path"].map(functools.partial(clean_path, folder=str(folder)))
    is_outside = paths.str.match(r"\.\.(/|$)") | paths.str.contains("\0", regex=False)
    problem = f"path {{}} leads out of {str(folder).replace('{', '{{').replace('}', '}}')}"
    images.check(is_outside, problem, "give an absolute path, or move the file", rows["path"])
    images.check(paths.duplicated(), "duplicate path {}", "remove the repetition", rows["path"])
    rows["path"] = paths
    return images


def _columns(
    path: Path, aliases: Mapping[str, tuple[str, ...]], what: str, header: list[str]
) -> dict[str, int]:
    """Returns the position of each column that a table has, and logs their names.

    Raises:
        DataError: no column has the paths, or a name that is needed occurs twice.
    """
    names = [re.sub(r"[ .-]+", "_", name.casefold()) for name in header]
    found = {}
    for column, accepted in aliases.items():
        name = next((alias for alias in accepted if alias in names), None)
        if name is None:
            continue
        if names.count(name) > 1:
            raise DataError(
                f"{path}: the header {shorten(header)} has the column {name} twice; rename one"
            )
        found[column] = names.index(name)
    if "path" not in found:
        raise DataError(
            f"{path}: the header {shorten(header)} has no column with the {what}' paths; name it "
            f"{aliases['path'][0]}"
        )
    used = [
        name if header[place] == name else f"{name} (column {header[place]!r})"
        for name, place in found.items()
    ]
    log.info("%s: %s", path, ", ".join(used))
    return found


def _read_parquet(path: Path, select: Callable[[list[str]], dict[str, int]]) -> pd.DataFrame:
    """Returns columns of a Parquet file as text; see `read_columns`."""
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            names = parquet.schema_arrow.names
            columns = select([str(name).casefold() for name in names])
            table = parquet.read([names[place] for place in columns.values()], use_threads=False)
        cells = [_cells(table.column(names[place])) for place in columns.values()]
    except (OSError, pyarrow.ArrowException, MemoryError) as error:
        if is_system_error(error) and not isinstance(error, MemoryError):
            raise unreadable(path, error) from None
        reason = "".join(filter(str.isprintable, one_line(error)))  # may quote bytes
        raise DataError(f"{path} is not a readable Parquet file ({reason}): save it") from None
    frame = pd.DataFrame(dict(zip(columns, cells, strict=True)), dtype=str)
    return frame.set_axis(range(1, len(frame) + 1))


def _cells(column: Any) -> list[str]:
    """Returns the values of a column of pyarrow as text; '' = null."""
    return ["" if value is None else str(value).strip() for value in column.to_pylist()]


def _clean_splits(images: ImageList) -> pd.Series:
    """Returns a value of `SPLITS` for each row; '' where the table has no splits."""
    cells = images.rows["split"]
    words = {cell: SPLITS.get(cell.casefold(), "") for cell in cells.unique()}
    splits = cells.map(words)
    if (cells != "").any():
        images.check(
            splits == "",
            "split {} must be train, validation or test",
            "correct it, or rename the column if it means something else",
            cells,
        )
    return splits


def clean_path(path: str, folder: str) -> str:
    """Returns a path with '/', without '.' and inner '..', relative if it is below the folder."""
    if "\\" in path and "\0" not in path and not os.path.lexists(os.path.join(folder, path)):
        path = path.replace("\\", "/")
    path = posixpath.normpath(path)
    if path.startswith("/"):
        prefix = os.path.join(os.path.abspath(folder), "")
        return path.removeprefix(prefix)
    return path


# --- folders --------------------------------------------------------------------------------------


def has_class_folders(folder: Path) -> bool:
    """Whether a folder has class folders with images, with or without splits."""
    splits = [place for place in _subfolders(folder) if place.name.casefold() in SPLITS]
    classes = [place for top in splits or [folder] for place in _subfolders(top)]
    return any(next(_walk(place, set()), None) for place in classes)


def _list_folders(folder: Path, has_splits: bool) -> ImageList:
    """Returns the images below a folder, whose names tell their splits and classes."""
    others: set[str] = set()
    splits = {place: SPLITS.get(place.name.casefold(), "") for place in _subfolders(folder)}
    splits = {place: split for place, split in splits.items() if split and has_splits}
    splits = splits or {folder: ""}
    rows = []
    for top, split in splits.items():
        for path in _walk(top, others):
            below = path.relative_to(top).parts
            if not split and below[0].casefold() in SPLITS:
                below = below[1:]
            label = below[0] if len(below) > 1 else ""
            _check_name(path)
            rows.append((path.relative_to(folder).as_posix(), label, "", "", split))
    if others:
        log.info("%s: files that are no images are ignored: %s", folder, ", ".join(sorted(others)))
    if not rows:
        raise DataError(f"{folder} holds no images")
    return ImageList(pd.DataFrame(rows, columns=list(ALIASES)), folder, None)


def _check_name(path: Path) -> None:
    """Refuses a file whose name is not text, which no table can hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        name = os.fsencode(path).decode(errors="backslashreplace")
        raise DataError(f"{name}: the name is not UTF-8; rename the file or its folder") from None


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_debris(path.name))


def _walk(folder: Path, others: set[str]) -> Iterator[Path]:
    """Yields the image files below a folder in a fixed order; adds other files' suffixes."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_debris(name))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes() and not _is_debris(name):
                yield Path(place, name)
            elif not _is_debris(name):
                others.add(suffix or name)


def _is_debris(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _DEBRIS
