"""Prepared records: one TFDS dataset, one builder config per reader.

Beside each split's records lies `<split>.csv`, one row a record in the records' order: id, label,
slide, and per channel the sum of the pixels and of their squares, so that splits and
normalisation need no image. `prepared.json` says from which files they came.
"""

import contextlib
import functools
import io
import itertools
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds
from tensorflow_datasets.core import ExampleSerializer
from tensorflow_datasets.proto import tf_example_pb2

from histo_jax import files, preemption, progress
from histo_jax.config import Config, DataConfig
from histo_jax.data import kaggle, pcam, slides, synthetic
from histo_jax.data.example import IMAGE_SHAPE, Example
from histo_jax.data.loader import Records, Source
from histo_jax.errors import ExpectedError

log = logging.getLogger("histo_jax")

SUMS = ("sum_red", "sum_green", "sum_blue")
SQUARES = ("squares_red", "squares_green", "squares_blue")
_RECORD = "prepared.json"
_SHARD = 8192  # records in one file: 230 MB
_AT_ONCE = 512  # examples in memory: 14 MB

# What is replaced while records are written (TFDS's serializer, stdout) belongs to the process.
_one_at_a_time = threading.Lock()


class _Reader(NamedTuple):
    """Examples of one split, and how many there are (None = not known yet)."""

    examples: Iterator[Example]
    total: int | None


class _ReaderConfig(tfds.core.BuilderConfig):
    """A source with its settings.

    Attributes:
        damaged: what is wrong with the files that were left out, by path.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.damaged: dict[str, str] = {}

    def raw_files(self) -> list[Path]:
        """Returns the files that the records are made from; none where they cannot be seen."""
        return []

    def readers(self, scratch: Path, downloads: Any) -> dict[str, _Reader]:
        """Returns one reader a split, when records must be written."""
        raise NotImplementedError


class _Kaggle(_ReaderConfig):
    def __init__(self, data: DataConfig) -> None:
        super().__init__("kaggle")
        self._raw_dir = Path(data.raw_dir).expanduser() if data.raw_dir else None
        self._skip = data.on_damaged == "skip"

    def raw_files(self) -> list[Path]:
        if self._raw_dir is None or not self._raw_dir.is_dir():
            return []
        return kaggle.raw_files(self._raw_dir)

    def readers(self, scratch: Path, downloads: Any) -> dict[str, _Reader]:
        if self._raw_dir is None:
            raise ExpectedError(
                "config.data.raw_dir is not set and no prepared records are there: "
                "set --config.data.raw_dir to the folder of the competition's files"
            )
        # Both splits are listed before the first image is read: a mistake in the test's CSV
        # must not show only after minutes of preparing.
        train, test = (kaggle.list_files(self._raw_dir, split) for split in ("train", "test"))
        # A submission needs every test patch, so none of them is left out.
        return {
            "train": _Reader(kaggle.read(train, self._skip, self.damaged), len(train)),
            "test": _Reader(kaggle.read(test, False, {}), len(test)),
        }


class _PatchCamelyon(_ReaderConfig):
    def __init__(self, data: DataConfig) -> None:
        super().__init__("pcam")
        self._raw_dir = Path(data.raw_dir).expanduser() if data.raw_dir else None

    def raw_files(self) -> list[Path]:
        if self._raw_dir is None or not self._raw_dir.is_dir():
            return []
        return pcam.raw_files(self._raw_dir)

    def readers(self, scratch: Path, downloads: Any) -> dict[str, _Reader]:
        found = pcam.find(self._raw_dir) if self._raw_dir else self._download(downloads)
        # Plain files are all checked before the first record; packed ones as they are unpacked.
        return {
            split: _Reader(
                self._read(its, scratch), None if ".gz" in (its.x.suffix, its.y.suffix)
                else pcam.check(its),
            )
            for split, its in found.items()
        }  # fmt: skip

    def _download(self, downloads: Any) -> dict[str, pcam.Files]:
        if sys.stderr.isatty():
            tfds.enable_progress_bar()
        try:
            return pcam.download(downloads)
        finally:
            tfds.disable_progress_bar()

    def _read(self, packed: pcam.Files, scratch: Path) -> Iterator[Example]:
        with pcam.unpacked(packed, scratch) as plain:
            yield from pcam.read(plain)


class _Synthetic(_ReaderConfig):
    def __init__(self, seed: int, slides: int) -> None:
        # The settings are part of the name, so that each lies in a folder of its own.
        super().__init__(f"synthetic-seed{seed}-slides{slides}")
        self._seed, self._slides = seed, slides

    def readers(self, scratch: Path, downloads: Any) -> dict[str, _Reader]:
        return {
            split: _Reader(synthetic.read(self._seed, self._slides, split), None)
            for split in synthetic.SPLITS
        }


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

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        # The usual writer keeps up to 1 GB of a split in memory and then asks for TensorFlow; the
        # sequential one needs an info of its own, made while `data_dir` is the temporary folder.
        info = self._info()
        writer = tfds.core.SequentialWriter(info, _SHARD, file_format="array_record")
        generators = self._split_generators(dl_manager)
        writer.initialize_splits(list(generators))
        for split, examples in generators.items():
            # It rewrites the info at each call.
            while chunk := list(itertools.islice(examples, _AT_ONCE)):
                writer.add_examples({split: chunk})
        writer.close_all()
        self.info.set_splits(info.splits)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        readers = self.builder_config.readers(Path(self.data_dir), dl_manager)
        return {split: self._generate_examples(split, reader) for split, reader in readers.items()}

    def _generate_examples(self, split: str, reader: _Reader) -> Iterator[dict[str, Any]]:
        rows = []
        ones = np.ones(IMAGE_SHAPE[0] * IMAGE_SHAPE[1])
        bar = progress.bar(reader.examples, split, reader.total, unit=" img")
        for example in preemption.stopping(bar):
            # Exact in float64, and by a matrix product several times as fast as `sum`.
            pixels = example.image.reshape(-1, 3).astype(np.float64)
            sums = np.concatenate([ones @ pixels, np.einsum("ij,ij->j", pixels, pixels)])
            rows.append((example.id, example.label, example.slide, *sums.astype(np.int64)))
            yield example._asdict()
        table = pd.DataFrame(rows, columns=["id", "label", "slide", *SUMS, *SQUARES])
        table.to_csv(Path(self.data_dir) / f"{split}.csv", index=False)


class _Parsed:
    """Random access to records; TFDS's own parser takes twice as long, under Python's lock."""

    def __init__(self, serialised: Any, literal: files.LiteralFolder) -> None:
        self._serialised = serialised
        self._literal = literal  # as long as records are read, their folder keeps this name

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [_parse(record) for record in self._serialised.__getitems__(rows)]


def _parse(record: bytes) -> dict[str, Any]:
    features = tf_example_pb2.Example.FromString(record).features.feature
    pixels = np.frombuffer(features["image"].bytes_list.value[0], np.uint8)
    return {
        "id": features["id"].bytes_list.value[0],
        "image": pixels.reshape(IMAGE_SHAPE),
        "label": features["label"].int64_list.value[0],
        "slide": features["slide"].bytes_list.value[0],
    }


class Prepared:
    """Prepared records that lie on disk.

    Attributes:
        directory: folder of the records.
        tables: per split a table, row i = record i: id, label, slide ('' = not known), pixel sums.
    """

    def __init__(
        self,
        builder: Histopathology,
        directory: Path,
        literal: files.LiteralFolder,
        data: DataConfig,
    ) -> None:
        self._builder, self._literal = builder, literal
        self.directory = directory
        self.tables = {
            split: _read_table(directory / f"{split}.csv", info.num_examples)
            for split, info in builder.info.splits.items()
        }
        self.tables["train"] = slides.fill_in(self.tables["train"], data, self.directory)

    def source(self, split: str) -> Source:
        """Returns random access to a split's records."""
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return _Parsed(
            self._builder.as_data_source(split=split, deserialize_method=raw), self._literal
        )

    def records(self, split: str, rows: np.ndarray) -> Records:
        """Returns some labelled records of a split, by row."""
        labels = self.tables[split]["label"].to_numpy(np.float32)[rows]
        return Records(self.source(split), rows, labels)


def _read_table(path: Path, rows: int) -> pd.DataFrame:
    types = {"id": str, "slide": str}
    try:
        table = pd.read_csv(path, dtype=types, na_values=[], keep_default_na=False)
    except ValueError:
        raise _damaged(path) from None
    # Cut inside a number, the last row looks whole.
    if len(table) != rows or not path.read_bytes().endswith(b"\n"):
        raise _damaged(path)
    return table


def prepare(config: Config, write: bool = True) -> Prepared:
    """Returns the records of `config.data`, writing them first where they are not there yet.

    TFDS writes to a temporary folder and renames it, so a break leaves nothing that looks
    finished. Of several processes one writes, and the others wait for it.

    Args:
        config: all settings.
        write: false: only those that are there, whatever has become of the raw files.

    Raises:
        ExpectedError: the raw data is missing, wrong, or no longer that of the records; `write` is
            false, and no records are there.
        OSError: `data.tfds_dir` cannot be written, or the disk is full.
    """
    data = config.data
    reader: _ReaderConfig = (
        _Kaggle(data) if data.source == "kaggle"
        else _PatchCamelyon(data) if data.source == "pcam"
        else _Synthetic(config.seed, data.synthetic_slides)
    )  # fmt: skip
    tfds_dir = Path(data.tfds_dir).expanduser()
    files.check_name(tfds_dir, "--config.data.tfds_dir")
    existing = files.nearest(tfds_dir)
    if not existing.is_dir() or not os.access(existing, os.X_OK):
        raise ExpectedError(
            f"{tfds_dir} cannot be a folder, for {existing} is none: set --config.data.tfds_dir"
        )
    if files.is_special(tfds_dir):
        if write:
            tfds_dir.mkdir(parents=True, exist_ok=True)
        elif not tfds_dir.exists():
            raise ExpectedError(f"{tfds_dir} holds no prepared records")
    literal = files.LiteralFolder(tfds_dir)
    make = functools.partial(
        Histopathology, data_dir=literal.path, config=reader, file_format="array_record"
    )
    directory = tfds_dir / Path(make().data_dir).relative_to(literal.path)
    if not write:
        if not (directory / _RECORD).exists():
            raise ExpectedError(f"{directory} holds no prepared records")
        return Prepared(make(), directory, literal, data)
    if not (directory / _RECORD).exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time, _locked(directory.parent / "lock"):
            if not (directory / _RECORD).exists():
                _write(make, directory, reader)
    _check_raw_files(directory, reader, data)
    return Prepared(make(), directory, literal, data)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for other processes; the system lets go of the lock however this one ends."""
    is_told = False
    with files.open_lock(path) as file:
        while True:
            try:
                if not files.lock(file):
                    log.warning(
                        "%s cannot be locked, its file system keeps no locks: see to it that no "
                        "other process prepares the same records now", path,
                    )  # fmt: skip
                break
            except BlockingIOError:
                if not is_told:
                    log.info("waiting for another process that prepares %s", path.parent)
                is_told = True
            if preemption.requested():
                raise preemption.Preempted
            time.sleep(0.2)
        yield


def _write(make: Callable[[], Histopathology], directory: Path, reader: _ReaderConfig) -> None:
    # What a killed process left; the record is written last, so without it nothing is finished.
    for left_over in (directory, *directory.parent.glob("incomplete.*")):
        shutil.rmtree(left_over, ignore_errors=True)
    log.info("preparing %s into %s", reader.name, directory)
    seen = _fingerprint(reader)
    with contextlib.ExitStack() as stack:
        # TFDS announces "unknown size" there, and its bars know no total.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(mock.patch.object(ExampleSerializer, "serialize_example", _serialize))
        stack.enter_context(files.naming(directory.parent))
        stack.enter_context(files.disk_errors(directory.parent))
        tfds.disable_progress_bar()
        stack.callback(tfds.enable_progress_bar)
        make().download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                try_download_gcs=False, force_checksums_validation=True
            )
        )
    for path, reason in reader.damaged.items():
        log.warning("left out: %s %s", path, reason)
    files.write_json(directory / _RECORD, {**seen, "damaged": reader.damaged})


def _damaged(path: Path) -> ExpectedError:
    return ExpectedError(f"{path} is damaged: remove {path.parent} to prepare again")


def _serialize(serializer: ExampleSerializer, example: Any) -> bytes:
    """Replaces TFDS's own, whose order of fields changes from process to process."""
    return serializer.get_tf_example(example).SerializeToString(deterministic=True)


def _fingerprint(reader: _ReaderConfig) -> dict[str, Any]:
    paths = reader.raw_files()
    content, times = files.fingerprints(paths) if paths else (None, None)
    return {"files": content, "times": times}


def _check_raw_files(directory: Path, reader: _ReaderConfig, data: DataConfig) -> None:
    """Compares the raw files, where all can be seen, with those the records were made from."""
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
    except ValueError:
        raise _damaged(directory / _RECORD) from None
    again = f"remove {directory} to prepare again, or set another --config.data.tfds_dir"
    if record["damaged"] and data.on_damaged == "stop":
        raise ExpectedError(
            f"{len(record['damaged'])} damaged patches were left out of these records: set "
            f"--config.data.on_damaged=skip, or restore the files and {again}"
        )
    try:
        now = _fingerprint(reader)
    except ExpectedError as error:  # the records are whole without them
        log.warning("using %s as it is: %s", directory, error)
        return
    # Downloaded records name no files: those that are named now are others.
    if now["files"] and now["files"] != record["files"]:
        raise ExpectedError(f"{data.raw_dir} holds other files than were prepared: {again}")
    if now["times"] and record["times"] and now["times"] != record["times"]:
        log.warning("%s has changed since it was prepared: %s", data.raw_dir, again)
