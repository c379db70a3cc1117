"""Divides the examples into training, validation and test."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from histo_jax.config import DataConfig
from histo_jax.data import groups, overlap, sampling
from histo_jax.data.example import UNLABELLED
from histo_jax.data.record_files import SQUARES, SUMS, pixel_hashes
from histo_jax.errors import DataError

log = logging.getLogger("histo_jax")


class Subset(NamedTuple):
    """Some examples of a split of the records.

    Attributes:
        records: name of the split of the records that holds them.
        rows: int64[n], their rows, ascending.
    """

    records: str
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Subsets:
    """The examples to train on, to validate on and to test on.

    Attributes:
        train: examples to train on.
        validation: examples that choose the checkpoint; none of them is in `train`.
        test: examples to predict; None where the data has none.
        by: 'patient' or 'slide' where training and validation share none, 'image' where they only
            share no image, 'official' where the data's own split was kept and its slides are not
            all known.
        slide_disjoint: whether training and validation share no slide; None = not known. A random
            split by image is taken to share slides.
        patient_disjoint: whether they share no patient; None = not known.
    """

    train: Subset
    validation: Subset
    test: Subset | None
    by: str
    slide_disjoint: bool | None
    patient_disjoint: bool | None = None

    @property
    def division(self) -> str:
        """How training and validation were divided, as text."""
        if self.slide_disjoint is not None:
            return f"by {self.by}"
        if self.by == "official":
            return "by the data's own split, slides not checked"
        return "by image, because each patch names a slide of its own, or a patient"

    @property
    def caveat(self) -> str:
        """The caveat that belongs beside a validation score; '' where there is none."""
        return overlap.caveat(self.slide_disjoint, self.patient_disjoint)


def make_subsets(tables: dict[str, pd.DataFrame], data: DataConfig, seed: int) -> Subsets:
    """Draws the balanced sample and divides it; official splits are kept.

    Args:
        tables: per split the columns `id`, `label` (0 or 1), `slide` and, where known, `patient`
            ('' = not known); see `record_reader.Prepared`. A 'validation' split is used as a
            whole, unless `data.fold` divides the training patches instead.
        data: `samples_per_class`, `validation_fraction`, `split_by` and `fold`.
        seed: of the sample and the division, `Config.data_seed`.

    Raises:
        DataError: `split_by` is 'slide' or 'patient' but none is known, or a subset lacks a class.
    """
    table, unit = tables["train"], _unit(tables, data)
    sample = draw_sample(tables, data, seed)
    if unit == "official":
        train, validation = sample, Subset("validation", np.arange(len(tables["validation"])))
    else:
        labels = table["label"].to_numpy()[sample.rows]
        names = _groups(table, unit)
        own = None if names is None else names[sample.rows]
        inside = sampling.select_validation(labels, own, unit, data, seed)
        train, validation = (Subset("train", sample.rows[rows]) for rows in (~inside, inside))
    _check_classes(tables, train, validation)
    test = Subset("test", np.arange(len(tables["test"]))) if "test" in tables else None
    return Subsets(train, validation, test, *_describe(tables, unit, train, validation))


def _groups(table: pd.DataFrame, unit: str) -> np.ndarray | None:
    """Returns the group of each patch that is not divided; None = each patch is its own."""
    if unit == "patient":
        return groups.connect(table)
    return table["slide"].to_numpy() if unit == "slide" else None


def _describe(
    tables: dict[str, pd.DataFrame], unit: str, train: Subset, validation: Subset
) -> tuple[str, bool | None, bool | None]:
    """Returns `by`, `slide_disjoint` and `patient_disjoint` of `Subsets`."""
    first, second = ((tables[subset.records], subset.rows) for subset in (train, validation))
    table = tables["train"]
    patient_disjoint = overlap.disjoint_patients(first, second)
    slide_disjoint: bool | None = False
    if unit == "official":
        slide_disjoint = overlap.disjoint(first, second)
    elif unit == "slide":
        slide_disjoint = groups.has_names(table, "slide") or None
    elif unit == "patient":
        patient_disjoint = groups.has_names(table, "patient") or None
        drawn = [table.iloc[rows] for table, rows in (first, second)]
        are_known = all((groups.names(rows, "slide") != "").all() for rows in drawn)
        knows_slides = are_known and groups.has_names(table, "slide")
        slide_disjoint = patient_disjoint or knows_slides or None
    if patient_disjoint and unit in ("patient", "official"):
        return "patient", slide_disjoint, patient_disjoint
    if unit == "official" and slide_disjoint is None:
        return unit, slide_disjoint, patient_disjoint
    return "slide" if slide_disjoint else "image", slide_disjoint, patient_disjoint


def _check_classes(tables: dict[str, pd.DataFrame], train: Subset, validation: Subset) -> None:
    """Refuses subsets that lack a class."""
    for name, subset in (("training", train), ("validation", validation)):
        labels = tables[subset.records]["label"].iloc[subset.rows]
        counts = np.bincount(labels, minlength=2)
        if counts.min() == 0:
            raise DataError(
                f"the {name} set has {counts[0]} patches of label 0 and {counts[1]} of label 1, "
                "and needs both classes: give more patches of the other"
            )


def _unit(tables: dict[str, pd.DataFrame], data: DataConfig) -> str:
    """Returns the unit of division: 'official' = the data's own split, or one of `split_by`."""
    is_official = "validation" in tables and data.fold is None
    known = [unit for unit in groups.UNITS if groups.is_named(tables["train"], unit)]
    if data.split_by in groups.UNITS and data.split_by not in known and not is_official:
        source = "config.data.slide_map" if data.split_by == "slide" else "a source that names them"
        raise DataError(
            f"config.data.split_by = {data.split_by!r}, but this data names no {data.split_by}s: "
            f"give {source}, or use 'auto' or 'image'"
        )
    if is_official:
        return "official"
    return [*known, "image"][0] if data.split_by == "auto" else data.split_by


def draw_sample(tables: dict[str, pd.DataFrame], data: DataConfig, seed: int) -> Subset:
    """Returns the training patches that are drawn before they are divided; see `make_subsets`."""
    rows = np.flatnonzero(_is_safe(tables, data))
    labels = tables["train"]["label"].to_numpy()[rows]
    return Subset("train", rows[sampling.sample(labels, data.samples_per_class, seed)])


def _is_safe(tables: dict[str, pd.DataFrame], data: DataConfig) -> np.ndarray:
    """Returns bool[n], false for training patches that cannot be divided by slide or patient.

    An example whose slide (patient) is not known may share it with any other.
    """
    table, unit = tables["train"], _unit(tables, data)
    if unit not in groups.UNITS:
        return np.ones(len(table), bool)
    return (groups.names(table, unit) != "").to_numpy()


def labelled(tables: dict[str, pd.DataFrame], subset: Subset) -> Subset:
    """Returns those examples of a subset whose label is known."""
    labels = tables[subset.records]["label"].to_numpy()[subset.rows]
    return subset._replace(rows=subset.rows[labels != UNLABELLED])


def left_out(tables: dict[str, pd.DataFrame], data: DataConfig) -> str:
    """Returns which patches are left out because their slide or patient is not known; '' = none."""
    count, unit = int((~_is_safe(tables, data)).sum()), _unit(tables, data)
    if not count:
        return ""
    smaller = "slide, or image" if unit == "patient" else "image"
    return (
        f"{count} of {len(tables['train'])} training patches do not name their {unit} and are left "
        f"out: name it, or set --config.data.split_by={smaller}"
    )


def channel_stats(table: pd.DataFrame, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel over all pixels of some examples.

    Exact integer sums make the result independent of the order.

    Args:
        table: of a split, with the columns `SUMS`, `SQUARES` and `pixels`.
        rows: int64[n], the examples.

    Returns:
        Two float32[3], in units of the full range (0 = black, 1 = full).
    """
    chosen = table.iloc[rows]
    pixels = int(chosen["pixels"].sum())
    mean = chosen[list(SUMS)].sum().to_numpy(np.float64) / pixels
    square = chosen[list(SQUARES)].sum().to_numpy(np.float64) / pixels
    # A training set of one flat colour would otherwise divide by zero.
    std = np.sqrt(np.maximum(square - mean**2, 1.0))
    return (mean / 255).astype(np.float32), (std / 255).astype(np.float32)


def fingerprint(
    tables: dict[str, pd.DataFrame], subsets: Subsets, seed: int, batch_size: int
) -> str:
    """Returns a SHA-256 of everything that decides which example comes at which step.

    Args:
        tables: see `make_subsets`.
        subsets: of them.
        seed: of the order, `Config.seed`.
        batch_size: examples per step.
    """
    digest = hashlib.sha256(f"{seed} {batch_size}".encode())
    for subset in (subsets.train, subsets.validation):
        digest.update("\n".join(["", *tables[subset.records]["id"].iloc[subset.rows]]).encode())
    return digest.hexdigest()


def check_fingerprint(expected: str, actual: str, tfds_dir: str) -> None:
    """Refuses examples other than those that a run has trained on.

    Args:
        expected: `fingerprint` of the run's examples.
        actual: `fingerprint` of the examples that the records hold now.
        tfds_dir: `config.data.tfds_dir`, for the message.

    Raises:
        DataError: they differ.
    """
    if expected != actual:
        raise DataError(
            f"{tfds_dir} no longer holds the examples that this run started with, or "
            "config.data.slide_map has changed: restore them or choose another --workdir"
        )


def check_size(expected: int, actual: int, tfds_dir: str) -> None:
    """Refuses patches of another size than those that a run has trained on.

    Raises:
        DataError: they differ.
    """
    if expected != actual:
        raise DataError(
            f"the run was trained on patches of {expected}x{expected} pixels, and those in "
            f"{tfds_dir} have {actual}x{actual}: give data of that size, or choose another run"
        )


def refuse_leak(tables: dict[str, pd.DataFrame], subsets: Subsets, allow: bool) -> None:
    """Refuses to train on pixels and patients of the data's own validation and test splits.

    Patches that are drawn from the training split to validate count as those that are trained on.
    Pixels of patches of one colour are excepted.

    Raises:
        DataError: there are some, and `allow` is false.
    """
    own = [part.rows for part in (subsets.train, subsets.validation) if part.records == "train"]
    train = tables["train"].iloc[np.sort(np.concatenate(own))]
    for other in (subsets.validation, subsets.test):
        if other is None or other.records == "train":
            continue
        split = other.records
        for leak, fix in _leaks(train, tables[split].iloc[other.rows], split):
            if not allow:
                raise DataError(
                    f"{leak}: {fix}, or set --config.data.allow_leak=true and trust no {split} "
                    "score"
                )
            log.warning(
                "LEAK: %s; config.data.allow_leak is set, so no %s score can be trusted",
                leak, split,
            )  # fmt: skip


def _leaks(train: pd.DataFrame, evaluated: pd.DataFrame, split: str) -> Iterator[tuple[str, str]]:
    """Yields what a split of the data shares with the training patches, each with its fix."""
    if shared := sorted(overlap.shared_names(train, evaluated, "patient")):
        yield (
            f"{len(shared)} patients have patches in the train and in the {split} split, the first "
            f"is {shared[0]!r}",
            "correct the splits",
        )
    ids = overlap.shared_ids(train, evaluated)
    if not ids.empty:
        row = train.loc[ids.index[0]]
        is_same = pixel_hashes(evaluated) == pixel_hashes(train)[ids.index[0]]
        paths = [part.get("path") for part in (row, evaluated[is_same].iloc[0])]
        files = f" ({' and '.join(paths)})" if all(paths) else ""
        yield (
            f"{len(ids)} training patches are also {split} patches, the first is {row['id']}"
            f"{files}",
            "remove them",
        )
