"""Reads prepared records: their tables, and the pixels at random."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from histo_jax.config import DataConfig
from histo_jax.data import slide_map
from histo_jax.data.loader import RandomAccessSource, Records
from histo_jax.data.record_files import read_table
from histo_jax.run import files


class _ParsedSource:
    """Random access to parsed records.

    TFDS's own parser takes twice as long and holds Python's lock.

    Args:
        serialized: TFDS's random access to serialized records.
        literal: name of their folder, which is valid only while this object exists.
        size: height and width of the images.
    """

    def __init__(self, serialized: Any, literal: files.LiteralFolder, size: int) -> None:
        self._serialized, self._literal, self._size = serialized, literal, size

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [_parse(record, self._size) for record in self._serialized.__getitems__(rows)]


def _parse(record: bytes, size: int) -> dict[str, Any]:
    features = tf_example_pb2.Example.FromString(record).features.feature
    pixels = np.frombuffer(features["image"].bytes_list.value[0], np.uint8)
    return {
        "id": features["id"].bytes_list.value[0],
        "image": pixels.reshape(size, size, 3),
        "label": features["label"].int64_list.value[0],
        "slide": features["slide"].bytes_list.value[0],
    }


class Prepared:
    """Prepared records on disk.

    Args:
        directory: their folder.
        data: `slide_map` names the slides of patches that do not.

    Attributes:
        directory: their folder.
        name: the value of `config.data.records` that selects them.
        image_size: height and width of all patches in pixels.
        tables: one table per split, row i = record i; the columns are those of
            `histo_jax.data.record_files`, and `pixels`, the number of each patch's pixels.

    Raises:
        DataError: a file of the records or the slide map is corrupt.
    """

    def __init__(self, directory: Path, data: DataConfig) -> None:
        self._literal = files.LiteralFolder(directory)
        self._builder = tfds.builder_from_directory(self._literal.path)
        self.directory = directory
        self.name = directory.parent.name
        self.image_size = int(self._builder.info.features["image"].shape[0])
        self.tables = {
            split: read_table(directory / f"{split}.csv", info.num_examples, self.image_size)
            for split, info in self._builder.info.splits.items()
        }
        self.tables["train"] = slide_map.fill_in(self.tables["train"], data, directory)
        self.tables = slide_map.unify(self.tables)

    def __repr__(self) -> str:
        counts = ", ".join(f"{split}: {len(table)}" for split, table in self.tables.items())
        return f"Prepared({str(self.directory)!r}, {counts})"

    def source(self, split: str) -> RandomAccessSource:
        """Returns random access to the records of a split."""
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        serialized = self._builder.as_data_source(split=split, deserialize_method=raw)
        return _ParsedSource(serialized, self._literal, self.image_size)

    def records(self, split: str, rows: np.ndarray) -> Records:
        """Returns the labelled records int64[n] `rows` of a split."""
        labels = self.tables[split]["label"].to_numpy(np.float32)[rows]
        return Records(self.source(split), rows, labels)
