"""Reads CSV files of the user."""

import codecs
import contextlib
import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from histo_jax.data.raw_files import unreadable
from histo_jax.errors import DataError, one_line

_DELIMITERS = ",;\t"
# White space, and the invisible characters that spreadsheets and web pages leave around a cell.
_SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace())
_SPACES += "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060"
# Characters of a cell: some files have outlines of regions in a column.
csv.field_size_limit(2**24)
_LABELS = {"false": 0, "true": 1}
_FIX = "correct it, or save or download it again"
# The first line by which Excel is given the delimiter.
_DELIMITER_LINE = re.compile(r'"?sep=([,;|\t])"?\s*', re.IGNORECASE)


def read_csv(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Returns `read_columns` of the columns with these names, which are in lower case.

    Raises:
        DataError: as `read_columns`; or the CSV lacks one of the columns, or has it twice.
    """

    def select(header: list[str]) -> dict[str, int]:
        if any(header.count(name) != 1 for name in columns):
            raise DataError(
                f"{path}: the header must name the columns {','.join(columns)} once each, and is "
                f"{shorten(header)}; correct the header"
            )
        return {name: header.index(name) for name in columns}

    return read_columns(path, select)


def shorten(header: list[str]) -> str:
    """Returns the names of a header as text of limited length for a message."""
    return repr(",".join(header)[:80])


def read_columns(path: Path, select: Callable[[list[str]], dict[str, int]]) -> pd.DataFrame:
    """Returns columns of a CSV as text without surrounding spaces, indexed by line; '' = empty.

    Accepts what spreadsheets and pandas write: UTF-8 or, with a byte-order mark, UTF-16; commas,
    semicolons or tabs, or what a first line such as `sep=;` names; columns in any order, further
    columns; empty lines; header names in any case.

    pandas's reader does not serve: it uses the first cells of rows that are too long as an index,
    and 100,000 commas in one row cost it 13 seconds and half a GB.

    Args:
        path: the file.
        select: from the header's names, in lower case, to the columns of the result and the
            position of each in the header.

    Raises:
        DataError: it cannot be read, or is not a CSV; or what `select` raises.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
        utf_16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with path.open(encoding="utf-16" if utf_16 else "utf-8-sig", newline="") as file:
            return _parse(path, file, select)
    except UnicodeError as error:
        raise DataError(
            f"{path} is not a readable CSV ({one_line(error)}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _parse(path: Path, file: TextIO, select: Callable[[list[str]], dict[str, int]]) -> pd.DataFrame:
    start = next((line for line in file if line.strip()), "")
    file.seek(0)
    if "\0" in start:  # UTF-16 without a byte-order mark
        raise DataError(f"{path} is not a readable CSV (it contains zero bytes); save it as UTF-8")
    named = _DELIMITER_LINE.fullmatch(start)
    delimiter = named[1] if named else max(_DELIMITERS, key=start.count)
    reader = csv.reader(file, strict=True, delimiter=delimiter)
    rows, lines = [], []
    try:
        numbered = _non_empty(reader)
        if named:
            next(numbered, None)
        header = [name.casefold() for name in next(numbered, (0, []))[1]]
        if not header:
            raise DataError(f"{path} is not a readable CSV (it is empty); {_FIX}")
        columns = select(header)
        for line, row in numbered:
            if any(row[len(header) :]):
                raise DataError(
                    f"{path} is not a readable CSV (line {line} is longer than the header); {_FIX}"
                )
            rows.append([row[index] if index < len(row) else "" for index in columns.values()])
            lines.append(line)
    except csv.Error as error:
        raise DataError(
            f"{path} is not a readable CSV (line {reader.line_num}: {one_line(error)}); {_FIX}"
        ) from None
    return pd.DataFrame(rows, columns=list(columns), index=lines, dtype=str)


def parse_label(text: str) -> int | None:
    """Returns 0 or 1 as tables write them (1, 1.0, True), or None."""
    with contextlib.suppress(ValueError):
        number = float(text)
        return int(number) if number in (0, 1) else None
    return _LABELS.get(text.lower())


def _non_empty(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows that are not empty, each with its first line; cells are stripped."""
    line = 1
    for row in reader:
        cells = [cell.strip(_SPACES) for cell in row]
        if any(cells):
            yield line, cells
        line = reader.line_num + 1
