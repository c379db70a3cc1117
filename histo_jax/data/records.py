"""Which prepared records a command uses: those of the run, of the raw files, or new ones.

Records of several studies are stored in one `data.tfds_dir`, each in a folder named after the
source and the fingerprint of its data.
"""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from histo_jax import environment
from histo_jax.config import DataConfig
from histo_jax.data import record_writer
from histo_jax.data.record_files import DATASET, VERSION, Manifest, is_complete, read_manifest
from histo_jax.data.record_reader import Prepared
from histo_jax.data.source_adapter import (
    SourceAdapter,
    check_layout,
    check_patches,
    known_size,
)
from histo_jax.errors import DataError, UserError
from histo_jax.run import files, progress
from histo_jax.run.workdir import Workdir

__all__ = ["Prepared", "existing", "prepare"]

log = logging.getLogger("histo_jax")


class _RawData(NamedTuple):
    """The state of the source's data.

    Attributes:
        fingerprint: hash of the data; None = not known.
        modified: hash of its modification times, where the source has one.
        problem: why the data cannot be read, if so.
    """

    fingerprint: str | None = None
    modified: str | None = None
    problem: UserError | None = None


@environment.defaults()
@progress.working("prepare")
def prepare(
    data: DataConfig, seed: int, workdir: Path | None = None, raw_may_be_gone: bool = False
) -> Prepared:
    """Returns the records of a source, writing them first where they are missing.

    Args:
        data: settings of the data, validated.
        seed: of the data, `Config.data_seed`.
        workdir: folder of a run, which keeps to the records that it started with.
        raw_may_be_gone: accept that the raw data is missing or has changed if the `config.json`
            of `workdir` names the same `data.raw_dir`; for modes that only read.

    Raises:
        DataError: the raw data is missing, wrong, or not that of the run's records; or several
            records fit, and no setting selects one.
        OSError: `data.tfds_dir` cannot be written, or the disk is full.
    """
    if size := known_size(data):  # before patches are read
        check_patches(data, size)
    source, dataset = SourceAdapter(data, seed), _dataset_folder(data)
    raw = _read_raw(source, data)
    run_records = Workdir(workdir).status().get("records") if workdir else None
    saved = Workdir(workdir).saved_config() if raw_may_be_gone and workdir else None
    is_lenient = bool(saved and saved.holds("data.raw_dir", data.raw_dir))
    manifest = _Selection(data, source, dataset, raw).select(run_records, is_lenient)
    if manifest is None:
        directory = dataset / records_name(source.name, raw.fingerprint) / VERSION
        record_writer.write_once(directory, source, raw.fingerprint, raw.modified)
        manifest = read_manifest(directory)
    _check_corrupt(manifest, source, data)
    prepared = Prepared(manifest.directory, data)
    check_patches(data, prepared.image_size)
    counts = ", ".join(f"{len(table):,} {name}" for name, table in prepared.tables.items())
    message = f"records: {manifest.directory} ({counts} patches), {manifest.describe()}"
    log.info("%s", message, extra=environment.ONCE)
    return prepared


def existing(data: DataConfig, seed: int, workdir: Path) -> Iterator[Prepared]:
    """Yields the records that a run may have used, the most likely first; writes none.

    Args:
        data: settings of the run.
        seed: of its data, `Config.data_seed`.
        workdir: its folder.
    """
    source, dataset = SourceAdapter(data, seed), _dataset_folder(data)
    names = [data.records, Workdir(workdir).status().get("records")]
    names += [records_name(source.name, _read_raw(source, data).fingerprint)]
    manifests = _complete(dataset, source.name)
    for manifest in sorted(manifests, key=lambda manifest: manifest.name not in names):
        yield Prepared(manifest.directory, data)


def records_name(source: str, fingerprint: str | None) -> str:
    """Returns the name of records: the source's name and, if known, its shortened fingerprint."""
    if fingerprint is None:
        return source
    if re.fullmatch(r"[A-Za-z0-9_.-]{1,24}", fingerprint):
        return f"{source}-{fingerprint}"
    if not re.fullmatch(r"[0-9a-f]+", fingerprint):
        fingerprint = hashlib.sha256(fingerprint.encode(errors="replace")).hexdigest()
    return f"{source}-{fingerprint[:12]}"


def _dataset_folder(data: DataConfig) -> Path:
    """Returns the folder that holds a folder for each study's records."""
    tfds_dir = files.expand(data.tfds_dir, "--config.data.tfds_dir")
    files.check_name(tfds_dir, "--config.data.tfds_dir")
    nearest = files.nearest(tfds_dir)
    if not nearest.is_dir() or not os.access(nearest, os.X_OK):
        raise DataError(
            f"{tfds_dir} cannot be created, because {nearest} is not a folder that can be "
            "entered: set --config.data.tfds_dir"
        )
    return tfds_dir / DATASET


def _read_raw(source: SourceAdapter, data: DataConfig) -> _RawData:
    try:
        check_layout(data)
        return _RawData(source.fingerprint(), source.modified())
    except UserError as error:
        return _RawData(problem=error)


def _complete(dataset: Path, source: str) -> list[Manifest]:
    """Returns all complete records of a source, by name; corrupt ones are reported where used."""
    manifests = []
    paths = [*dataset.glob(f"{source}/{VERSION}"), *dataset.glob(f"{source}-*/{VERSION}")]
    for directory in sorted(paths):
        if is_complete(directory):
            with contextlib.suppress(UserError):
                manifests.append(read_manifest(directory))
    return [manifest for manifest in manifests if manifest.source == source]


class _Selection:
    """Selects records among those of a source that are complete.

    Args:
        data: settings.
        source: of the records.
        dataset: folder of all studies.
        raw: state of the source's data.
    """

    def __init__(
        self, data: DataConfig, source: SourceAdapter, dataset: Path, raw: _RawData
    ) -> None:
        self._data, self._dataset, self._raw = data, dataset, raw
        self._source = source
        self._complete = _complete(dataset, source.name)

    def select(self, run_records: str | None, is_lenient: bool) -> Manifest | None:
        """Returns the records to use, None where they must be written.

        Args:
            run_records: name of the records that the run started with.
            is_lenient: accept that the raw data is missing or has changed.
        """
        own = self._named(self._data.records or run_records)
        if self._raw.problem:
            return self._without_raw(own, is_lenient)
        if self._raw.fingerprint is None and self._data.raw_dir is None:
            return own or self._only()
        same = [manifest for manifest in self._complete if self._is_same(manifest)]
        if own is None:
            own = same[-1] if same else self._only() if is_lenient else None
        if own and own not in same:
            self._refuse_or_warn(own, is_lenient)
        if own and self._raw.modified and own.modified not in (None, self._raw.modified):
            log.warning(
                "%s has changed since it was prepared: times differ, sizes and sampled contents do "
                "not; if its files were edited, remove %s to prepare them again",
                self._data.raw_dir, own.directory,
            )  # fmt: skip
        return own

    def _named(self, name: str | None) -> Manifest | None:
        own = next((manifest for manifest in self._complete if manifest.name == name), None)
        if self._data.records and not own:
            raise DataError(
                f"config.data.records = {self._data.records!r} is not in {self._dataset}, which "
                f"holds {self._listed() or f'no records of {self._source.name}'}"
            )
        return own

    def _without_raw(self, own: Manifest | None, is_lenient: bool) -> Manifest:
        problem = self._raw.problem
        assert problem
        if not self._complete:
            raise problem
        if not is_lenient:
            hint = f" (--config.data.raw_dir=None uses the records in {self._dataset})"
            raise DataError(f"{problem}{hint if self._data.raw_dir else ''}") from None
        manifest = own or self._only()
        assert manifest
        log.warning("%s; using %s, %s", problem, manifest.name, manifest.describe())
        return manifest

    def _is_same(self, manifest: Manifest) -> bool:
        if manifest.fingerprint is None:
            # Version 0.1.0 noted no fingerprint of synthetic slides, whose name has it.
            return manifest.name == records_name(self._source.name, self._raw.fingerprint)
        return manifest.fingerprint == self._raw.fingerprint

    def _refuse_or_warn(self, own: Manifest, is_lenient: bool) -> None:
        """Handles raw data that is not that of the records."""
        place = self._data.raw_dir or f"source {self._source.name!r}"
        message = f"{place} has other {self._source.content} than {own.name}, {own.describe()}"
        if not is_lenient:
            other = "--config.data.records" if self._data.records else "--workdir"
            raise DataError(f"{message}: restore it, or choose another {other}")
        log.warning("%s; using %s", message, own.name)

    def _only(self) -> Manifest | None:
        if len(self._complete) > 1:
            raise DataError(
                f"{self._dataset} holds several records, {self._listed()}: set "
                "--config.data.records to one of these names, or --config.data.raw_dir to the "
                "folder of its files"
            )
        return self._complete[0] if self._complete else None

    def _listed(self) -> str:
        return ", ".join(f"{manifest.name} ({manifest.describe()})" for manifest in self._complete)


def _check_corrupt(manifest: Manifest, source: SourceAdapter, data: DataConfig) -> None:
    """Refuses records without their corrupt files, unless the settings allow it."""
    if manifest.corrupt and data.on_damaged == "stop":
        raise DataError(
            f"{len(manifest.corrupt)} corrupt patches were left out of these records: set "
            "--config.data.on_damaged=skip, or restore the files and remove "
            f"{manifest.directory} to prepare them again"
        )
    if intact := source.intact(manifest.corrupt):
        log.warning(
            "%d corrupt patches that were left out are intact now: remove %s to prepare them again",
            len(intact),
            manifest.directory,
        )
