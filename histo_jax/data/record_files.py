"""The files of a folder of records, a TFDS dataset in ArrayRecord format.

Beside the shards of each split is a table `<split>.csv` with one row per record, in the order of
the records: id, label, slide, where known patient and path, and for each channel the sum of its
pixels and of their squares, so that splits and normalisation read no image. `prepared.json`,
written last, describes the data that the records were made from.
"""

import datetime
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds

from histo_jax.errors import DataError, UserError
from histo_jax.run import files

DATASET, VERSION = "histopathology", "1.0.0"
FILE_FORMAT = "array_record"
SUMS = ("sum_red", "sum_green", "sum_blue")
SQUARES = ("squares_red", "squares_green", "squares_blue")
_MANIFEST = "prepared.json"
# Keys of version 0.1.0, whose records are otherwise the same.
_OLD_KEYS = {"files": "fingerprint", "times": "modified", "damaged": "corrupt"}


def features(size: int) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a record.

    Args:
        size: height and width of its image in pixels.
    """
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            # Raw bytes: PNG would need TensorFlow to encode and cost time to decode.
            "image": tfds.features.Tensor(
                shape=(size, size, 3), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
            ),
            "label": np.int64,
            "slide": tfds.features.Text(),
        }
    )


class Manifest(NamedTuple):
    """The content of `prepared.json`.

    Attributes:
        directory: folder of the records.
        source: name of the source that they were made by.
        fingerprint: hash of the data that they were made from; None = not known.
        modified: hash of the modification times of files that the fingerprint covers in part only.
        corrupt: the reason for each file that was left out, by path.
        origin: description of the data that they were made from, such as its folder.
    """

    directory: Path
    source: str
    fingerprint: str | None
    modified: str | None
    corrupt: dict[str, str]
    origin: str

    @property
    def name(self) -> str:
        """The value of `config.data.records` that selects these records."""
        return self.directory.parent.name

    def describe(self) -> str:
        """Returns origin and date as text."""
        written = (self.directory / _MANIFEST).stat().st_mtime
        date = datetime.datetime.fromtimestamp(written).strftime("%Y-%m-%d %H:%M")
        return f"made from {self.origin} on {date}"

    def write(self) -> None:
        """Writes `prepared.json`."""
        values = {name: value for name, value in self._asdict().items() if name != "directory"}
        files.write_json(self.directory / _MANIFEST, values)


def is_complete(directory: Path) -> bool:
    """Whether a folder holds complete records."""
    return (directory / _MANIFEST).is_file()


def read_manifest(directory: Path) -> Manifest:
    """Returns the content of `prepared.json`, also as version 0.1.0 wrote it.

    Raises:
        DataError: it is corrupt.
    """
    path = directory / _MANIFEST
    try:
        values: dict[str, Any] = {
            "source": directory.parent.name.partition("-")[0],
            "fingerprint": None,
            "modified": None,
            "corrupt": {},
            "origin": "a folder that version 0.1.0 did not note",
        }
        for key, value in json.loads(path.read_text(encoding="utf-8")).items():
            values[_OLD_KEYS.get(key, key)] = value
        return Manifest(directory, **values)
    except (ValueError, TypeError, AttributeError):
        raise corrupt(path) from None


def read_table(path: Path, rows: int, size: int) -> pd.DataFrame:
    """Returns the table of a split, with the number of each patch's pixels in a column `pixels`.

    Args:
        path: the CSV file.
        rows: number of its rows.
        size: height and width of the patches.

    Raises:
        DataError: it is corrupt.
    """
    types = {"id": str, "slide": str, "sha1": str}
    try:
        table = pd.read_csv(path, dtype=types, na_values=[], keep_default_na=False)
    except ValueError:
        raise corrupt(path) from None
    # A last row that was cut inside a number looks complete.
    if len(table) != rows or not path.read_bytes().endswith(b"\n"):
        raise corrupt(path)
    return table.assign(pixels=size**2)


def pixel_hashes(table: pd.DataFrame) -> pd.Series:
    """Returns the SHA-1 of each patch's pixels: the id, unless a user's source has other ids."""
    return table["sha1"] if "sha1" in table else table["id"]


def corrupt(path: Path) -> UserError:
    """Returns the error for a corrupt file of records."""
    return DataError(f"{path} is corrupt: remove {path.parent} to prepare the records again")
