"""CSV files that others wrote."""

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from histo_jax.data.raw_files import unreadable
from histo_jax.errors import UserError, one_line

_DELIMITERS = ",;\t"
# All that is white, and what spreadsheets and web pages leave unseen around a cell.
_SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace())
_SPACES += "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060"
# Characters of a cell; outlines of regions stand in some columns that nobody asks for.
csv.field_size_limit(2**24)
_AGAIN = "mend it or download it again"


def read_csv(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Returns some columns as text without spaces around it, indexed by line; '' = no cell.

    Reads what spreadsheets and pandas write: UTF-8 or, with its mark, UTF-16; commas, semicolons or
    tabs; columns in any order, others beside them; empty lines. Header names may differ in case.

    Not pandas's reader: it takes the first cells of rows that are too long for an index, and
    100,000 commas in one of them cost it 13 seconds and half a GB.

    Raises:
        UserError: it cannot be read, is no CSV, or lacks one of the columns.
    """
    try:
        with path.open("rb") as file:
            mark = file.read(2)
        utf_16 = mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with path.open(encoding="utf-16" if utf_16 else "utf-8-sig", newline="") as file:
            return _parse(path, file, columns)
    except UnicodeError as error:
        raise UserError(
            f"{path} is no readable CSV ({one_line(error)}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _parse(path: Path, file: TextIO, columns: tuple[str, ...]) -> pd.DataFrame:
    start = next((line for line in file if line.strip()), "")
    file.seek(0)
    if "\0" in start:  # UTF-16 without its mark
        raise UserError(f"{path} is no readable CSV (zero bytes in it); save it as UTF-8")
    reader = csv.reader(file, strict=True, delimiter=max(_DELIMITERS, key=start.count))
    rows, lines = [], []
    try:
        numbered = _filled(reader)
        header = [name.casefold() for name in next(numbered, (0, []))[1]]
        if not header:
            raise UserError(f"{path} is no readable CSV (it is empty); {_AGAIN}")
        if any(header.count(name) != 1 for name in columns):
            raise UserError(
                f"{path}: the header must be {','.join(columns)}, or name these once among others, "
                f"and is {start.strip()[:80]!r}; mend the header"
            )
        places = [header.index(name) for name in columns]
        for line, row in numbered:
            if any(row[len(header) :]):
                raise UserError(
                    f"{path} is no readable CSV (line {line} is longer than the header); {_AGAIN}"
                )
            rows.append([row[place] if place < len(row) else "" for place in places])
            lines.append(line)
    except csv.Error as error:
        raise UserError(
            f"{path} is no readable CSV (line {reader.line_num}: {one_line(error)}); {_AGAIN}"
        ) from None
    return pd.DataFrame(rows, columns=list(columns), index=lines, dtype=str)


def _filled(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, each with the line that it begins in; no spaces around cells."""
    line = 1
    for row in reader:
        cells = [cell.strip(_SPACES) for cell in row]
        if any(cells):
            yield line, cells
        line = reader.line_num + 1
