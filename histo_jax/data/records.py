"""Prepared records: one TFDS dataset, one builder config per reader.

Beside each split's records lies `<split>.csv`, one row a record in the records' order: id, label,
slide, and per channel the sum of the pixels and of their squares, so that splits and
normalisation need no image. `prepared.json` says from which files they came, and a short hash of
these files is part of the folder's name, so that several studies lie in one `data.tfds_dir`.
"""

import contextlib
import datetime
import io
import itertools
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds
from tensorflow_datasets.core import ExampleSerializer
from tensorflow_datasets.proto import tf_example_pb2

from histo_jax import environment
from histo_jax.config import Config, DataConfig, validate
from histo_jax.data import slide_map
from histo_jax.data.example import IMAGE_SHAPE, Example
from histo_jax.data.loader import Records, Source
from histo_jax.data.sources import kaggle, pcam, synthetic
from histo_jax.errors import UserError
from histo_jax.run import files, progress, signals
from histo_jax.run.workdir import Workdir

log = logging.getLogger("histo_jax")

SUMS = ("sum_red", "sum_green", "sum_blue")
SQUARES = ("squares_red", "squares_green", "squares_blue")
_RECORD = "prepared.json"
_SHARD = 8192  # records in one file: 230 MB
_AT_ONCE = 512  # examples in memory: 14 MB
_ABANDONED_SECONDS = 24 * 3600

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

    def fingerprint(self) -> tuple[str | None, str | None]:
        """Returns what the raw data holds, and its times, as SHA-256; None = cannot be seen."""
        return None, None

    def readers(self, scratch: Path, downloads: Any) -> dict[str, _Reader]:
        """Returns one reader a split, when records must be written."""
        raise NotImplementedError


class _Kaggle(_ReaderConfig):
    def __init__(self, data: DataConfig) -> None:
        super().__init__("kaggle")
        self._raw_dir = (
            files.expand(data.raw_dir, "--config.data.raw_dir") if data.raw_dir else None
        )
        self._skip = data.on_damaged == "skip"

    def fingerprint(self) -> tuple[str | None, str | None]:
        if self._raw_dir is None or not self._raw_dir.is_dir():
            return None, None
        return kaggle.fingerprint(self._raw_dir), None

    def readers(self, scratch: Path, downloads: Any) -> dict[str, _Reader]:
        if self._raw_dir is None:
            raise UserError(
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
        self._raw_dir = (
            files.expand(data.raw_dir, "--config.data.raw_dir") if data.raw_dir else None
        )

    def fingerprint(self) -> tuple[str | None, str | None]:
        if self._raw_dir is None or not self._raw_dir.is_dir():
            return None, None
        return pcam.fingerprint(self._raw_dir)

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
        with progress.bar(f"preparing {split}", reader.total, unit=" img") as bar:
            for example in signals.stopping(progress.counted(bar, reader.examples)):
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
        name: what `data.records` calls them.
        tables: per split a table, row i = record i: id, label, slide ('' = not known), pixel sums.
    """

    def __init__(self, reader: _ReaderConfig, directory: Path, data: DataConfig) -> None:
        self._literal = _literal(directory.parents[2])
        self._builder = builder = _make(reader, self._literal)
        self.directory = directory
        self.name = self.directory.parent.name
        self.tables = {
            split: _read_table(directory / f"{split}.csv", info.num_examples)
            for split, info in builder.info.splits.items()
        }
        self.tables["train"] = slide_map.fill_in(self.tables["train"], data, self.directory)
        self.tables = slide_map.unify(self.tables)

    def __repr__(self) -> str:
        counts = ", ".join(f"{split}: {len(table)}" for split, table in self.tables.items())
        return f"Prepared({str(self.directory)!r}, {counts})"

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


class _Finished(NamedTuple):
    """Records that are complete: their folder, and the content of its `prepared.json`."""

    directory: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.directory.parent.name

    @property
    def origin(self) -> str:
        """From what they were made, and when, in words."""
        written = (self.directory / _RECORD).stat().st_mtime
        day = datetime.datetime.fromtimestamp(written).strftime("%Y-%m-%d %H:%M")
        # Version 0.1.0 did not note the folder.
        source = self.record.get("origin", "files of a folder that was not noted")
        return f"made from {source} on {day}"


@environment.defaults()
@progress.working("prepare")
def prepare(config: Config, workdir: Path | None = None, raw_may_be_gone: bool = False) -> Prepared:
    """Returns the records of `config.data`, writing them first where they are not there yet.

    `prepare(config).tables["train"]` has a row for each training patch with `id`, `label` and
    `slide`, and `prepare(config).records("train", rows).images(positions)` reads pixels.

    TFDS writes to a temporary folder and renames it, so a break leaves nothing that looks
    finished. Of several processes one writes, and the others wait for it.

    Args:
        config: all settings.
        workdir: folder of a run, which keeps to the records that it began with.
        raw_may_be_gone: accept that `data.raw_dir` is missing or has changed if the `config.json`
            of `workdir` names the same folder; for modes that only read.

    Raises:
        UserError: the raw data is missing, wrong, or not that of the run's records; or several
            records fit, and nothing says which are meant.
        OSError: `data.tfds_dir` cannot be written, or the disk is full.
    """
    validate(config)
    data, reader, dataset = config.data, _reader(config), _dataset_folder(config.data)
    seen, problem = _look(reader, data)
    found = _choose(data, reader.name, dataset, workdir, raw_may_be_gone, seen, problem)
    if found is None:
        if seen["files"]:
            reader.name = f"{reader.name}-{seen['files'][:12]}"
        directory = dataset / reader.name / str(Histopathology.VERSION)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time, _locked(directory.parent / "lock"):
            if not (directory / _RECORD).exists():
                _write(directory, reader, seen, data)
        found = _read_record(directory)
    _check_damaged(found, data)
    reader.name = found.name
    prepared = Prepared(reader, found.directory, data)
    counts = ", ".join(f"{len(table):,} {name}" for name, table in prepared.tables.items())
    log.info(
        "records: %s (%s patches), %s", found.directory, counts, found.origin,
        extra=environment.ONCE,
    )  # fmt: skip
    return prepared


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
            if signals.requested():
                raise signals.Preempted
            time.sleep(0.2)
        yield


def existing(config: Config, workdir: Path) -> Iterator[Prepared]:
    """Yields the records that a run may have trained on, the most likely first; writes none.

    Args:
        config: of the run.
        workdir: its folder.
    """
    reader, dataset = _reader(config), _dataset_folder(config.data)
    names = (config.data.records, Workdir(workdir).status().get("records"))
    for found in sorted(_finished(dataset, reader.name), key=lambda found: found.name not in names):
        reader.name = found.name
        yield Prepared(reader, found.directory, config.data)


def _reader(config: Config) -> _ReaderConfig:
    data = config.data
    if data.source == "kaggle":
        return _Kaggle(data)
    if data.source == "pcam":
        return _PatchCamelyon(data)
    if data.raw_dir is not None:
        raise UserError(
            f"config.data.raw_dir = {data.raw_dir!r} is not read by config.data.source = "
            "'synthetic': set --config.data.source=kaggle or pcam, or leave out raw_dir"
        )
    return _Synthetic(config.data_seed, data.synthetic_slides)


def _dataset_folder(data: DataConfig) -> Path:
    """Returns the folder in which each study's records have a folder of their own."""
    tfds_dir = files.expand(data.tfds_dir, "--config.data.tfds_dir")
    files.check_name(tfds_dir, "--config.data.tfds_dir")
    nearest = files.nearest(tfds_dir)
    if not nearest.is_dir() or not os.access(nearest, os.X_OK):
        raise UserError(
            f"{tfds_dir} cannot be a folder, for {nearest} is none: set --config.data.tfds_dir"
        )
    return tfds_dir / Histopathology.name


def _literal(tfds_dir: Path) -> files.LiteralFolder:
    """Returns a name of the folder that TFDS takes literally."""
    if files.is_special(tfds_dir):
        tfds_dir.mkdir(parents=True, exist_ok=True)
    return files.LiteralFolder(tfds_dir)


def _make(reader: _ReaderConfig, literal: files.LiteralFolder) -> Histopathology:
    return Histopathology(data_dir=literal.path, config=reader, file_format="array_record")


def _finished(dataset: Path, source: str) -> list[_Finished]:
    """Returns all complete records of a source by name; those of version 0.1.0 have no hash."""
    version = str(Histopathology.VERSION)
    paths = [*dataset.glob(f"{source}/{version}"), *dataset.glob(f"{source}-*/{version}")]
    found = []
    for path in sorted(paths):
        if (path / _RECORD).is_file():
            with contextlib.suppress(UserError):  # it is told where these records are used
                found.append(_read_record(path))
    return found


def _read_record(directory: Path) -> _Finished:
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        return _Finished(directory, {"files": None, "times": None, "damaged": {}, **record})
    except (ValueError, TypeError):
        raise _damaged(directory / _RECORD) from None


def _choose(
    data: DataConfig,
    source: str,
    dataset: Path,
    workdir: Path | None,
    raw_may_be_gone: bool,
    seen: dict[str, Any],
    problem: UserError | None,
) -> _Finished | None:
    """Returns the records to use, None where they must be written; see `prepare` and `_look`."""
    finished = _finished(dataset, source)
    name = data.records or (Workdir(workdir).status().get("records") if workdir else None)
    own = next((found for found in finished if found.name == name), None)
    if data.records and not own:
        raise UserError(
            f"config.data.records = {data.records!r} is not in {dataset}, which holds "
            f"{_listed(finished) or f'no records of {source}'}"
        )
    if data.raw_dir is None:
        return own or _only(finished, dataset)
    saved = Workdir(workdir).saved_config() if raw_may_be_gone and workdir else None
    is_lenient = bool(saved and saved.holds("data.raw_dir", data.raw_dir))
    if problem:
        if not finished:
            raise problem
        if not is_lenient:
            raise UserError(
                f"{problem} (--config.data.raw_dir=None uses the records in {dataset})"
            ) from None
        own = own or _only(finished, dataset)
        assert own
        log.warning("%s; going on with %s, %s", problem, own.name, own.origin)
        return own
    same = [found for found in finished if found.record["files"] == seen["files"]]
    if own is None and is_lenient and not same:
        own = _only(finished, dataset)
    if own is None:
        own = same[-1] if same else None
    elif own not in same and not is_lenient:
        raise UserError(
            f"{data.raw_dir} holds other files than {own.name}, {own.origin}: restore those, or "
            f"choose another {'--config.data.records' if data.records else '--workdir'}"
        )
    elif own not in same:
        log.warning(
            "%s holds other files than %s, %s, which is used", data.raw_dir, own.name, own.origin
        )
    if own and seen["times"] and own.record["times"] not in (None, seen["times"]):
        log.warning(
            "%s has changed since it was prepared: remove %s to prepare again",
            data.raw_dir, own.directory,
        )  # fmt: skip
    return own


def _only(finished: list[_Finished], dataset: Path) -> _Finished | None:
    if len(finished) > 1:
        raise UserError(
            f"{dataset} holds several records, {_listed(finished)}: set --config.data.records to "
            "the name of one, or --config.data.raw_dir to its files"
        )
    return finished[0] if finished else None


def _listed(finished: list[_Finished]) -> str:
    return ", ".join(f"{found.name} ({found.origin})" for found in finished)


def _look(reader: _ReaderConfig, data: DataConfig) -> tuple[dict[str, Any], UserError | None]:
    """Returns the fingerprint of `data.raw_dir`, or what is wrong with that folder."""
    nothing = {"files": None, "times": None}
    if data.raw_dir is None:
        return nothing, None
    try:
        _check_layout(files.expand(data.raw_dir, "--config.data.raw_dir"), data.source)
        return _fingerprint(reader), None
    except UserError as error:
        return nothing, error


def _check_layout(raw_dir: Path, source: str) -> None:
    if not raw_dir.is_dir():
        raise UserError(f"{raw_dir}: no such folder; set --config.data.raw_dir")
    fits = {
        "kaggle": (raw_dir / "train_labels.csv").exists(),
        "pcam": any(raw_dir.glob("camelyonpatch_level_2_split_*")),
    }
    other = next((name for name in fits if fits[name] and not fits[source]), None)
    if other:
        raise UserError(
            f"{raw_dir} holds files of data.source = {other!r} and none of {source!r}: set "
            f"--config.data.source={other}, or --config.data.raw_dir"
        )


def _write(directory: Path, reader: _ReaderConfig, seen: dict[str, Any], data: DataConfig) -> None:
    """Writes the records, and last of all `prepared.json`; leaves nothing where that fails.

    Args:
        directory: folder of the records; its parent is locked.
        reader: of the raw files.
        seen: their fingerprint.
        data: settings.
    """
    _remove_left_overs(directory)
    log.info("preparing %s into %s", reader.name, directory)
    try:
        with contextlib.ExitStack() as stack:
            # TFDS announces "unknown size" there, and its bars know no total.
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(
                mock.patch.object(ExampleSerializer, "serialize_example", _serialize)
            )
            stack.enter_context(files.naming(directory.parent))
            stack.enter_context(files.disk_errors(directory.parent))
            tfds.disable_progress_bar()
            stack.callback(tfds.enable_progress_bar)
            literal = _literal(directory.parents[2])  # is needed until all is written
            _make(reader, literal).download_and_prepare(
                download_config=tfds.download.DownloadConfig(
                    try_download_gcs=False, force_checksums_validation=True
                )
            )
        for path, reason in reader.damaged.items():
            log.warning("left out: %s %s", path, reason)
        record = {**seen, "damaged": reader.damaged, "origin": _origin(data, reader)}
        files.write_json(directory / _RECORD, record)
    except BaseException:
        _remove_unfinished(directory)
        raise


def _origin(data: DataConfig, reader: _ReaderConfig) -> str:
    if data.raw_dir:
        return str(Path(data.raw_dir).expanduser().absolute())
    return "the published files" if data.source == "pcam" else reader.name


def _remove_unfinished(directory: Path) -> None:
    """Removes a study's folder, whose lock is held, where it holds no complete records."""
    for path in directory.parent.glob("incomplete.*"):
        shutil.rmtree(path, ignore_errors=True)
    if (directory / _RECORD).exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        (directory.parent / "lock").unlink()
        directory.parent.rmdir()


def _remove_left_overs(directory: Path) -> None:
    """Removes what killed processes left, here and in other studies that nobody is preparing."""
    # The record is written last, so without it nothing is finished.
    for path in (directory, *directory.parent.glob("incomplete.*")):
        shutil.rmtree(path, ignore_errors=True)
    for lock_file in directory.parent.parent.glob("*/lock"):
        if lock_file.parent == directory.parent:
            continue
        # Without the lock (another process prepares there), or the right to write: let it be.
        with contextlib.suppress(OSError), files.open_lock(lock_file) as lock:
            files.lock(lock)
            written = (path.stat().st_mtime for path in lock_file.parent.rglob("*"))
            # Some network mounts give the lock to every host, so recent work counts as busy, too.
            if time.time() - max(written) > _ABANDONED_SECONDS:
                _remove_unfinished(lock_file.parent / directory.name)


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: remove {path.parent} to prepare again")


def _serialize(serializer: ExampleSerializer, example: Any) -> bytes:
    """Replaces TFDS's own, whose order of fields changes from process to process."""
    return serializer.get_tf_example(example).SerializeToString(deterministic=True)


def _fingerprint(reader: _ReaderConfig) -> dict[str, Any]:
    content, times = reader.fingerprint()
    return {"files": content, "times": times}


def _check_damaged(found: _Finished, data: DataConfig) -> None:
    damaged = found.record["damaged"]
    if damaged and data.on_damaged == "stop":
        raise UserError(
            f"{len(damaged)} damaged patches were left out of these records: set "
            f"--config.data.on_damaged=skip, or restore the files and remove {found.directory} to "
            "prepare again"
        )
    if whole := kaggle.restored(damaged):
        log.warning(
            "%d damaged patches that were left out are whole now: remove %s to prepare again",
            len(whole), found.directory,
        )  # fmt: skip
