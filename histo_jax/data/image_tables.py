"""Lists the images of a user: from a table, or from folders, see `histo_jax.data.image_folders`.

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
"""

import functools
import logging
import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from histo_jax import environment
from histo_jax.data.image_files import suffixes
from histo_jax.data.image_folders import list_folder
from histo_jax.data.image_list import COLUMNS, SPLIT_WORDS, ImageList
from histo_jax.data.names import UNKNOWN, clean_column, identity
from histo_jax.data.raw_files import is_system_error, unreadable
from histo_jax.data.tables import parse_label, read_columns, shorten
from histo_jax.errors import DataError, one_line

log = logging.getLogger("histo_jax")

TABLE = "images.csv"
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
_URL = r"[A-Za-z][A-Za-z0-9+.-]+://"
_WINDOWS_PATH = r"[A-Za-z]:[\\/]|\\\\"


def list_images(
    folder: Path | None, table: Path | None = None, has_splits: bool = True
) -> ImageList:
    """Returns the images of a table or a folder.

    Args:
        folder: of the images; may itself be a table or an image. None = that of the table.
        table: None = `images.csv` in the folder, or else the folders in it.
        has_splits: whether splits matter; false lists all images as of no split.

    Raises:
        DataError: the folder or table cannot be read, or rows of the table are wrong; names the
            first one, and their number.
    """
    if folder is not None and table is None and not folder.is_dir():
        if not folder.exists():
            raise DataError(f"{folder}: no such file or folder; give the folder of the images")
        if folder.suffix.lower() in suffixes():
            rows = pd.DataFrame([(folder.name, "", "", "", "")], columns=list(COLUMNS))
            return ImageList(rows, folder.parent, None)
        folder, table = None, folder
    if table is not None and not table.exists():
        raise missing_table(table, folder)
    if folder is None:
        assert table is not None
        folder = table.parent
    if table is None and (folder / TABLE).is_file():
        table = folder / TABLE
    if table is None:
        return list_folder(folder, has_splits)
    return read_table(table, folder, has_splits)


def missing_table(table: Path, folder: Path | None) -> DataError:
    """Returns the error for `data.table` that does not exist."""
    fix = "set --config.data.table"
    if not table.is_absolute():
        fix += ", whose relative paths start at the current folder"
    if folder is not None and (folder / table).is_file():
        fix += f": --config.data.table={folder / table}"
    return DataError(f"{table.absolute()}: no such table; {fix}")


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
    unknown = _NO_LABEL - {_class(positive or "")} if images.table else set()
    keys = {text: "" if text.casefold() in unknown else _class(text) for text in texts.unique()}
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
        has = f"which has {listed}"
        if None not in labels.values():
            has = "whose labels are 0 and 1: leave it out where 1 is the positive class"
        raise DataError(f"config.data.positive = {positive!r} is no class of {place}, {has}")
    labels = {text: int(key == _class(positive)) if key else -1 for text, key in keys.items()}
    return texts.map(labels).astype(int)


def _class(text: str) -> str:
    """Returns a name that is equal for all spellings of a class, also of one called 'NA'."""
    return identity(text) or text.casefold()


def read_table(
    path: Path,
    folder: Path,
    has_splits: bool = True,
    aliases: Mapping[str, tuple[str, ...]] = ALIASES,
    what: str = "images",
    needed: Sequence[str] = ("path",),
) -> ImageList:
    """Returns the images, or the slides, of a table.

    Args:
        path: of the table.
        folder: of relative paths.
        has_splits: see `list_images`.
        aliases: the names that each column may have; those of `ALIASES`, and others.
        what: is listed, for messages.
        needed: columns that may not be missing.

    Raises:
        DataError: see `list_images`.
    """
    columns = functools.partial(_columns, path, aliases, what, needed)
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
    _check_paths(images)
    rows["split"] = _clean_splits(images) if has_splits else ""
    rows["slide"], rows["patient"] = clean_column(rows["slide"]), clean_column(rows["patient"])
    paths = rows["path"].map(functools.partial(clean_path, folder=str(folder)))
    is_outside = paths.str.match(r"\.\.(/|$)") | paths.str.contains("\0", regex=False)
    problem = f"path {{}} leads out of {str(folder).replace('{', '{{').replace('}', '}}')}"
    images.check(is_outside, problem, "give an absolute path, or move the file", rows["path"])
    images.check(paths.duplicated(), "duplicate path {}", "remove the repetition", rows["path"])
    rows["path"] = paths
    return images


def _columns(
    path: Path,
    aliases: Mapping[str, tuple[str, ...]],
    what: str,
    needed: Sequence[str],
    header: list[str],
) -> dict[str, int]:
    """Returns the position of each column that a table has, and logs their names.

    Raises:
        DataError: a column that is needed is missing, or its name occurs twice.
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
    for column in needed:
        if column not in found:
            raise DataError(
                f"{path}: the header {shorten(header)} has no column with the {what}' {column}s; "
                f"name it {aliases[column][0]}"
            )
    used = [
        name if header[place] == name else f"{name} (column {header[place]!r})"
        for name, place in found.items()
    ]
    log.info("%s", f"{path}: {', '.join(used)}", extra=environment.ONCE)
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
        reason = "".join(filter(str.isprintable, one_line(error))).rstrip(".")  # may quote bytes
        raise DataError(
            f"{path} is not a readable Parquet file ({reason}): write it again, or save the table "
            "as .csv"
        ) from None
    frame = pd.DataFrame(dict(zip(columns, cells, strict=True)), dtype=str)
    return frame.set_axis(range(1, len(frame) + 1))


def _cells(column: Any) -> list[str]:
    """Returns the values of a column of pyarrow as text; '' = null."""
    return ["" if value is None else str(value).strip() for value in column.to_pylist()]


def _check_paths(images: ImageList) -> None:
    """Refuses URLs and absolute Windows paths."""
    cells = images.rows["path"]
    for form, problem, fix in (
        (_URL, "path {} is a URL", "download the images, and give the paths of the files"),
        (_WINDOWS_PATH, "{} is an absolute Windows path", f"give it relative to {images.folder}"),
    ):
        images.check(cells.str.match(form), problem, fix, cells)


def _clean_splits(images: ImageList) -> pd.Series:
    """Returns a value of `SPLIT_WORDS` for each row; '' where the table has no splits."""
    cells = images.rows["split"]
    words = {cell: SPLIT_WORDS.get(cell.casefold(), "") for cell in cells.unique()}
    splits = cells.map(words)
    if (cells != "").any():
        images.check(
            cells == "",
            "the split is missing{:.0}",
            "add it, or leave the cells of all rows empty",
            cells,
        )
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
