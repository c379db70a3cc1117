"""Prepared records: one TFDS dataset, one builder config per reader.

Beside each split's records lies `<split>.csv`, one row a record in the records' order: id, label,
slide, and per channel the sum of the pixels and of their squares, so that splits and
normalisation need no image.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds

from histo_jax.config import Config
from histo_jax.data import kaggle, synthetic
from histo_jax.data.example import IMAGE_SHAPE, Example
from histo_jax.data.loader import Source
from histo_jax.errors import ExpectedError

log = logging.getLogger("histo_jax")

_FINGERPRINT = "raw_fingerprint.txt"
SUMS = ("sum_red", "sum_green", "sum_blue")
SQUARES = ("squares_red", "squares_green", "squares_blue")


class _ReaderConfig(tfds.core.BuilderConfig):
    """A reader with its settings."""

    def fingerprint(self) -> str:
        """Tells one set of raw files from another; '' where they cannot be seen."""
        return ""

    def readers(self) -> dict[str, Iterator[Example]]:
        """Returns one reader a split; called when records must be written."""
        raise NotImplementedError


class _Kaggle(_ReaderConfig):
    def __init__(self, raw_dir: Path | None) -> None:
        super().__init__(name="kaggle", description="Histopathologic Cancer Detection")
        self.raw_dir = raw_dir

    def fingerprint(self) -> str:
        if self.raw_dir is None or not self.raw_dir.is_dir():
            return ""
        return kaggle.fingerprint(self.raw_dir)

    def readers(self) -> dict[str, Iterator[Example]]:
        if self.raw_dir is None:
            raise ExpectedError(
                "config.data.raw_dir is not set and no prepared records are there: "
                "set --config.data.raw_dir to the folder of the competition's files"
            )
        # Both splits are listed before the first image is read: a mistake in the test's CSV
        # must not show only after an hour of preparing.
        files = {split: kaggle.list_files(self.raw_dir, split) for split in ("train", "test")}
        return {split: kaggle.read(listed) for split, listed in files.items()}


class _Synthetic(_ReaderConfig):
    def __init__(self, seed: int, slides: int) -> None:
        # The settings are part of the name, so that each lies in a folder of its own.
        super().__init__(name=f"synthetic-seed{seed}-slides{slides}", description="drawn slides")
        self.seed, self.slides = seed, slides

    def readers(self) -> dict[str, Iterator[Example]]:
        return {s: synthetic.read(self.seed, self.slides, s) for s in ("train", "test")}


class Histopathology(tfds.core.GeneratorBasedBuilder):
    """Patches with id, label and slide, as ArrayRecord; needs no TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                # Raw bytes: PNG would need TensorFlow to encode and cost time to decode.
                "image": tfds.features.Tensor(
                    shape=IMAGE_SHAPE, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
                ),
                "label": np.int64,
                "slide": tfds.features.Text(),
            }
        )
        # Unshuffled, record i is row i of the CSV; Grain shuffles where it matters.
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        readers = self.builder_config.readers()
        (Path(self.data_dir) / _FINGERPRINT).write_text(self.builder_config.fingerprint())
        return {split: self._generate_examples(split, reader) for split, reader in readers.items()}

    def _generate_examples(
        self, split: str, reader: Iterator[Example]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = []
        for example in reader:
            pixels = example.image.reshape(-1, 3).astype(np.uint32)
            rows.append(
                (
                    example.id,
                    example.label,
                    example.slide,
                    *pixels.sum(axis=0, dtype=np.uint64),
                    *np.einsum("ij,ij->j", pixels, pixels),
                )
            )
            yield example.id, example._asdict()
        table = pd.DataFrame(rows, columns=["id", "label", "slide", *SUMS, *SQUARES])
        table.to_csv(Path(self.data_dir) / f"{split}.csv", index=False)


class Prepared:
    """Prepared records that lie on disk.

    Attributes:
        directory: folder of the records.
        tables: per split a table, row i = record i: id, label, slide (''= not known), pixel sums.
    """

    def __init__(self, builder: Histopathology) -> None:
        self._builder = builder
        self.directory = Path(builder.data_dir)
        self.tables = {
            split: pd.read_csv(
                self.directory / f"{split}.csv",
                dtype={"id": str, "slide": str},
                na_values=[],
                keep_default_na=False,
            )
            for split in builder.info.splits
        }

    def source(self, split: str) -> Source:
        """Returns random access to a split's records."""
        return self._builder.as_data_source(split=split)


def prepare(config: Config) -> Prepared:
    """Returns the records of `config.data`, writing them first where they are not there yet.

    TFDS writes to a temporary folder and renames it, so a break leaves nothing half-written.

    Raises:
        ExpectedError: the raw data is missing or wrong.
        OSError: `data.tfds_dir` cannot be written, or the disk is full.
    """
    data = config.data
    if data.source == "kaggle":
        reader = _Kaggle(Path(data.raw_dir).expanduser() if data.raw_dir else None)
    else:
        reader = _Synthetic(config.seed, data.synthetic_slides)
    tfds_dir = Path(data.tfds_dir).expanduser()
    existing = next(p for p in (tfds_dir, *tfds_dir.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.X_OK):
        raise ExpectedError(
            f"{tfds_dir} cannot be a folder, for {existing} is none: set --config.data.tfds_dir"
        )
    builder = Histopathology(data_dir=tfds_dir, config=reader, file_format="array_record")
    if not Path(builder.data_dir).exists():
        log.info("preparing %s into %s", reader.name, builder.data_dir)
        with contextlib.ExitStack() as stack:
            # TFDS announces "unknown size" and its own paths there.
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if not sys.stderr.isatty():
                tfds.disable_progress_bar()
                stack.callback(tfds.enable_progress_bar)
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    prepared = Prepared(builder)
    now = reader.fingerprint()
    if now and now != (prepared.directory / _FINGERPRINT).read_text():
        raise ExpectedError(
            f"{prepared.directory} was prepared from other files than those in {data.raw_dir}: "
            "remove it or set another --config.data.tfds_dir"
        )
    return prepared
