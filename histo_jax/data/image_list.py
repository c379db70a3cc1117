"""A list of images, as tables and folders give it."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from histo_jax.errors import DataError

COLUMNS = ("path", "label", "slide", "patient", "split")
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


class ImageList(NamedTuple):
    """Images of a table or of folders; no file was opened.

    Attributes:
        rows: columns `path` (relative to `folder`, with '/', or absolute), `label`, `slide`,
            `patient` and `split` (one of `SPLITS`); text, '' = not known. The index is the line
            or row of the table, or counts the files of folders.
        folder: of relative paths.
        table: the table; None = the images are those of a folder.
    """

    rows: pd.DataFrame
    folder: Path
    table: Path | None

    def files(self) -> list[str]:
        """Returns the path of each row, with the folder; as text, which is smaller than `Path`."""
        folder = str(self.folder)
        return [os.path.join(folder, path) for path in self.rows["path"].tolist()]

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
