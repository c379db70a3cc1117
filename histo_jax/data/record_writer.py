"""Writes records: a TFDS dataset in ArrayRecord format, complete or not at all.

TFDS's own writers do not serve here. The default one keeps up to 1 GB of a split in memory and
then needs TensorFlow, and all of them serialise the fields of a record in an order that changes
from process to process, so that the same data gives other bytes.
"""

import contextlib
import hashlib
import logging
import math
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from histo_jax.data.example import Example, ReadAgain
from histo_jax.data.record_files import (
    DATASET,
    FILE_FORMAT,
    SQUARES,
    SUMS,
    VERSION,
    Manifest,
    features,
    is_complete,
)
from histo_jax.data.source_adapter import SourceAdapter
from histo_jax.errors import DataError
from histo_jax.run import files, progress, signals

log = logging.getLogger("histo_jax")

_SHARD = 8192 * 96 * 96  # pixels per file: 230 MB
# A group per record, so that any one can be read without its neighbours. Compression makes tissue
# smaller by a tenth at most, and writing several times as slow.
_OPTIONS = "group_size:1,uncompressed"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
_OPTIONAL = ("patient", "path")  # columns of tables in which a patch has one
_COLUMNS = ("id", "label", "slide", *_OPTIONAL)
_ABANDONED_SECONDS = 24 * 3600


def write_once(
    directory: Path, source: SourceAdapter, fingerprint: str | None, modified: str | None
) -> None:
    """Writes records unless they are complete; of several processes one writes, others wait.

    Everything is written to a temporary folder, which is then renamed, so that a process that is
    killed leaves nothing that looks complete.

    Args:
        directory: folder of the records.
        source: of the examples.
        fingerprint: hash of the source's data; None = not known.
        modified: hash of its modification times.

    Raises:
        UserError: the source's data is missing, corrupt or wrong.
        OSError: the folder cannot be written, or the disk is full.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.parent / "lock"):
        if is_complete(directory):
            return
        _remove_leftovers(directory)
        folder = directory.with_name(f"incomplete.{uuid.uuid4().hex}")
        try:
            with files.naming(directory.parent), files.disk_errors(directory.parent):
                folder.mkdir()
                try:
                    _write(folder, source, directory)
                except ReadAgain:
                    shutil.rmtree(folder)
                    folder.mkdir()
                    _write(folder, source, directory)
                for path, reason in source.corrupt.items():
                    log.warning("left out: %s %s", path, reason)
                Manifest(
                    directory=folder,
                    source=source.name,
                    fingerprint=fingerprint,
                    modified=modified,
                    corrupt=source.corrupt,
                    origin=source.origin,
                ).write()
                folder.rename(directory)
        except BaseException:
            _remove_incomplete(directory)
            raise


def _write(folder: Path, source: SourceAdapter, directory: Path) -> None:
    """Writes the shards and tables of all splits and TFDS's description of them.

    Args:
        folder: for the files.
        source: of the examples.
        directory: later name of `folder`.
    """
    literal = files.LiteralFolder(folder)  # keep it: its path is valid only while it exists
    scratch = folder / "scratch"
    scratch.mkdir()
    infos, serializer = [], _Serializer(source.name)
    splits = source.splits(scratch)  # refuses what it can without reading a patch
    log.info("preparing %s into %s", directory.parent.name, directory)
    for split, examples in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=literal.path,
            dataset_name=DATASET,
            split=split,
            filetype_suffix=FILE_FORMAT,
            template=_TEMPLATE,
        )
        infos.append(_write_split(folder, template, examples, serializer, source.is_built_in))
    shutil.rmtree(scratch)
    identity = tfds.core.DatasetIdentity(
        name=DATASET,
        version=tfds.core.Version(VERSION),
        data_dir=str(literal.path),
        module_name="",
        config_name=source.name,
    )
    # Unshuffled: record i is row i of the table. Grain shuffles in training.
    info = tfds.core.DatasetInfo(
        builder=identity, features=serializer.features, disable_shuffling=True
    )
    info.set_file_format(FILE_FORMAT)
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(literal.path)


class _Serializer:
    """Makes the records of a dataset, whose patches have the size of its first one.

    Args:
        source: name of the source, for messages.
    """

    def __init__(self, source: str) -> None:
        self._source, self._size = source, 0

    def __call__(self, split: str, example: Example) -> bytes:
        """Returns the record of an example.

        Raises:
            DataError: it has another size than the first one.
        """
        shape = example.image.shape
        if not self._size:
            self._size = shape[0]
            self.features = features(self._size)
        if shape != (self._size, self._size, 3):
            raise DataError(
                f"source {self._source!r}, {split} split: patch {example.id} has "
                f"{shape[0]}x{shape[1]} pixels and the first one {self._size}x{self._size}: give "
                "all patches one size"
            )
        # What TFDS's serializer makes of `features`, in a third of its time.
        record = tf_example_pb2.Example()
        values = record.features.feature
        for name in ("id", "slide"):
            values[name].bytes_list.value.append(getattr(example, name).encode())
        values["image"].bytes_list.value.append(example.image.tobytes())
        values["label"].int64_list.value.append(example.label)
        return record.SerializeToString(deterministic=True)


class _Shards:
    """Writes the records of one split into files of at most `_SHARD` pixels each."""

    def __init__(self, template: tfds.core.ShardedFileTemplate) -> None:
        self._template = template
        self._writer: ArrayRecordWriter | None = None
        self._lengths: list[int] = []
        self._bytes = 0

    def add(self, record: bytes, pixels: int) -> None:
        """Appends the record of a patch of so many pixels."""
        if self._writer is None or self._lengths[-1] >= _SHARD // pixels:
            self._close()
            path = self._template.sharded_filepath(shard_index=len(self._lengths), num_shards=None)
            self._writer = ArrayRecordWriter(str(path), _OPTIONS)
            self._lengths.append(0)
        self._writer.write(record)
        self._lengths[-1] += 1
        self._bytes += len(record)

    def finish(self) -> tfds.core.SplitInfo:
        """Closes the last file and returns what TFDS needs to know of the split."""
        self._close()
        return tfds.core.SplitInfo(
            name=self._template.split,
            shard_lengths=self._lengths,
            num_bytes=self._bytes,
            filename_template=self._template,
        )

    def _close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None


def _write_split(
    folder: Path,
    template: tfds.core.ShardedFileTemplate,
    examples: Iterable[Example],
    serializer: _Serializer,
    has_sha1_ids: bool,
) -> tfds.core.SplitInfo:
    """Writes the shards and the table of one split."""
    shards, rows = _Shards(template), []
    total = len(examples) if isinstance(examples, Sized) else None
    with progress.bar(f"preparing {template.split}", total, unit=" img") as bar:
        for example in signals.stopping(progress.counted(bar, examples)):
            shards.add(serializer(template.split, example), math.prod(example.image.shape[:2]))
            rows.append((*(getattr(example, name) for name in _COLUMNS), *_sums(example.image)))
            if not has_sha1_ids:
                rows[-1] += (hashlib.sha1(example.image.tobytes()).hexdigest(),)
    columns = [*_COLUMNS, *SUMS, *SQUARES, *([] if has_sha1_ids else ["sha1"])]
    table = pd.DataFrame(rows, columns=columns)
    unused = [name for name in _OPTIONAL if (table[name] == "").all()]
    # Names of files may have bytes that are no text.
    table.drop(columns=unused).to_csv(
        folder / f"{template.split}.csv", index=False, errors="backslashreplace"
    )
    return shards.finish()


def _sums(image: np.ndarray) -> list[int]:
    """Returns for each channel the sum of its pixels, then for each the sum of their squares."""
    # Over rows first, which are contiguous and fit into 32 bits: several times as fast.
    rows = image.reshape(len(image), -1)
    columns = rows.sum(0, dtype=np.uint32), np.square(rows, dtype=np.uint16).sum(0, dtype=np.uint32)
    return [total for part in columns for total in part.reshape(-1, 3).sum(0, np.int64).tolist()]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock, waiting for other processes; the system releases it however this one ends."""
    is_waiting = False
    with files.open_lock(path) as file:
        while True:
            try:
                if not files.lock(file):
                    log.warning(
                        "%s cannot be locked, its file system has no locks: make sure that no "
                        "other process prepares the same records now",
                        path,
                    )
                break
            except BlockingIOError:
                if not is_waiting:
                    log.info("waiting for another process that prepares %s", path.parent)
                is_waiting = True
            if signals.requested():
                raise signals.Preempted
            time.sleep(0.2)
        yield


def _remove_incomplete(directory: Path) -> None:
    """Removes the folder of a study, whose lock is held, unless it has complete records."""
    for path in directory.parent.glob("incomplete.*"):
        shutil.rmtree(path, ignore_errors=True)
    if is_complete(directory):
        return
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):
        (directory.parent / "lock").unlink()
        directory.parent.rmdir()


def _remove_leftovers(directory: Path) -> None:
    """Removes what killed processes left, here and in studies that no process is preparing."""
    # Without the manifest, which is written last, nothing is complete.
    for path in (directory, *directory.parent.glob("incomplete.*")):
        shutil.rmtree(path, ignore_errors=True)
    for lock_file in directory.parent.parent.glob("*/lock"):
        if lock_file.parent == directory.parent:
            continue
        # Without the lock (another process prepares there), or the right to write: leave it.
        with contextlib.suppress(OSError), files.open_lock(lock_file) as lock:
            files.lock(lock)
            times = (path.stat().st_mtime for path in lock_file.parent.rglob("*"))
            # Some network mounts give the lock to every host, so recent work counts as busy, too.
            if time.time() - max(times) > _ABANDONED_SECONDS:
                _remove_incomplete(lock_file.parent / directory.name)
