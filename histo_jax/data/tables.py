"""CSV files that others wrote."""

import csv
from pathlib import Path

import pandas as pd


def read_csv(path: Path) -> pd.DataFrame:
    """Returns all cells as text; what a short row lacks is ''.

    Not pandas's reader: it takes the first cells of rows that are too long for an index, and
    100,000 commas in one of them cost it 13 seconds and half a GB.

    Raises:
        ValueError: it is no CSV in UTF-8, or a row is longer than the header.
        OSError: it cannot be read.
    """
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if not 0 < len(header) == len(set(header)) < 100:
                raise ValueError("the header is empty, too long, or names a column twice")
            for row in reader:
                missing = len(header) - len(row)
                if missing < 0:
                    raise ValueError(f"line {reader.line_num} is longer than the header")
                if row:
                    rows.append(row + [""] * missing)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    return pd.DataFrame(rows, columns=header, dtype=str)
