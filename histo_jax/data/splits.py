"""Divides the examples into training, validation and test."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from histo_jax.config import DataConfig
from histo_jax.data import sampling
from histo_jax.data.names import identity
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
        by: 'slide' where training and validation share no slide, 'image' where they only share no
            image, 'official' where the data's own split was kept and its slides are not all known.
        slide_disjoint: whether training and validation share no slide; None = not known. A random
            split by image is taken to share slides.
    """

    train: Subset
    validation: Subset
    test: Subset | None
    by: str
    slide_disjoint: bool | None

    @property
    def division(self) -> str:
        """How training and validation were divided, as text."""
        if self.slide_disjoint is not None:
            return f"by {self.by}"
        if self.by == "official":
            return "by the data's own split, slides not checked"
        return "by image, because each patch names a slide of its own"


UNCHECKED = (
    "whether training and evaluation share slides was not checked: not all patches name their "
    "slide, or each names one of its own"
)
OPTIMISTIC = (
    "the score is optimistic: evaluated patches may be neighbours of training patches on the same "
    "slides"
)


def caveat(slide_disjoint: bool | None) -> str:
    """Returns the caveat that belongs beside a score; '' where there is none."""
    return "" if slide_disjoint else UNCHECKED if slide_disjoint is None else OPTIMISTIC


def combine(slide_disjoint: Iterable[bool | None]) -> bool | None:
    """Returns the value for all together: false if any is false, else None if any is None."""
    values = list(slide_disjoint)
    return False if False in values else None if None in values else True


def make_subsets(tables: dict[str, pd.DataFrame], data: DataConfig, seed: int) -> Subsets:
    """Draws the balanced sample and divides it; official splits are kept.

    Args:
        tables: per split the columns `id`, `label` (0 or 1) and `slide` ('' = not known); see
            `record_reader.Prepared`. A 'validation' split is used as a whole, unless `data.fold`
            divides the training patches instead.
        data: `samples_per_class`, `validation_fraction`, `split_by` and `fold`.
        seed: of the sample and the division, `Config.data_seed`.

    Raises:
        DataError: `split_by` is 'slide' but no slides are known, or a subset lacks a class.
    """
    table, by = tables["train"], _unit(tables, data)
    sample = draw_sample(tables, data, seed)
    if by == "official":
        train, validation = sample, Subset("validation", np.arange(len(tables["validation"])))
        slide_disjoint = disjoint((table, train.rows), (tables["validation"], validation.rows))
        by = {True: "slide", False: "image", None: "official"}[slide_disjoint]
    else:
        labels, slides = (table[name].to_numpy()[sample.rows] for name in ("label", "slide"))
        inside = sampling.select_validation(labels, slides if by == "slide" else None, data, seed)
        train, validation = (Subset("train", sample.rows[rows]) for rows in (~inside, inside))
        slide_disjoint = by == "slide"
        if slide_disjoint and not has_slide_names(table):
            by, slide_disjoint = "image", None
    _check_classes(tables, train, validation)
    test = Subset("test", np.arange(len(tables["test"]))) if "test" in tables else None
    return Subsets(train, validation, test, by, slide_disjoint)


def _check_classes(tables: dict[str, pd.DataFrame], train: Subset, validation: Subset) -> None:
    """Refuses subsets that lack a class."""
    for name, subset in (("training", train), ("validation", validation)):
        labels = tables[subset.records]["label"].iloc[subset.rows]
        counts = np.bincount(labels, minlength=2)
        if counts.min() == 0:
            raise DataError(
                f"the {name} set has {counts[0]} patches without and {counts[1]} with tumour, and "
                "needs both classes: give more patches of the other"
            )


def _unit(tables: dict[str, pd.DataFrame], data: DataConfig) -> str:
    """Returns the unit of division: 'official' = the data's own split, 'slide' or 'image'."""
    is_official = "validation" in tables and data.fold is None
    slides_known = bool((tables["train"]["slide"] != "").any())
    if data.split_by == "slide" and not (slides_known or is_official):
        raise DataError(
            "config.data.split_by = 'slide', but this data names no slides: give "
            "config.data.slide_map, or use 'auto' or 'image'"
        )
    if is_official:
        return "official"
    return "slide" if slides_known and data.split_by != "image" else "image"


def draw_sample(tables: dict[str, pd.DataFrame], data: DataConfig, seed: int) -> Subset:
    """Returns the training patches that are drawn before they are divided; see `make_subsets`."""
    labels, slides = (tables["train"][name].to_numpy() for name in ("label", "slide"))
    # An example whose slide is not known may share its slide with any other.
    is_safe = slides != "" if _unit(tables, data) == "slide" else np.ones(len(labels), bool)
    rows = np.flatnonzero(is_safe)
    return Subset("train", rows[sampling.sample(labels[rows], data.samples_per_class, seed)])


def has_slide_names(table: pd.DataFrame) -> bool:
    """Whether most patches share the name in `slide` with another patch.

    If not, the column holds another identifier, and dividing by it separates no slides.
    """
    counts = table["slide"][table["slide"] != ""].value_counts()
    return bool((counts == 1).sum() <= counts.sum() / 2)


def disjoint(
    first: tuple[pd.DataFrame, np.ndarray], second: tuple[pd.DataFrame, np.ndarray]
) -> bool | None:
    """Returns whether two subsets share no slide and no pixels; None = not all slides are known.

    Args:
        first: the whole table of its split, and the rows of the subset.
        second: likewise.
    """
    subsets = [table.iloc[rows] for table, rows in (first, second)]
    if share(*subsets):
        return False
    are_known = all((subset["slide"] != "").all() for subset in subsets)
    are_names = all(has_slide_names(table) for table, _ in (first, second))
    return True if are_known and are_names else None


def share(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Returns whether two parts of tables share a slide, or pixels of more than one colour.

    Args:
        first: columns as in `make_subsets`.
        second: likewise.
    """
    slides = set(slide_identities(first)) & set(slide_identities(second)) - {""}
    return bool(slides) or not shared_ids(first, second).empty


def slide_identities(table: pd.DataFrame) -> pd.Series:
    """Returns for each patch the `identity` of its slide, equal for all spellings."""
    return table["slide"].map({name: identity(name) for name in table["slide"].unique()})


def shared_ids(first: pd.DataFrame, second: pd.DataFrame) -> pd.Series:
    """Returns the ids of `first` whose pixels `second` has, too, except patches of one colour.

    Empty glass of two slides can be equal by chance. For the arguments see `share`.
    """
    shared = first[pixel_hashes(first).isin(pixel_hashes(second))]
    sums, squares = (shared[list(names)].to_numpy() for names in (SUMS, SQUARES))
    one_colour = (sums**2 == shared[["pixels"]].to_numpy() * squares).all(axis=1)
    return shared["id"][~one_colour]


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
    """Refuses to train on pixels that are also in the test set, patches of one colour excepted.

    Raises:
        DataError: there are some, and `allow` is false.
    """
    if subsets.test is None:
        return
    train = tables[subsets.train.records].iloc[subsets.train.rows]
    shared = shared_ids(train, tables[subsets.test.records].iloc[subsets.test.rows])
    if shared.empty:
        return
    leak = f"{len(shared)} training patches are also test patches, the first is {shared.iloc[0]}"
    if not allow:
        raise DataError(
            f"{leak}: remove them, or set --config.data.allow_leak=true and trust no test score"
        )
    log.warning("LEAK: %s; config.data.allow_leak is set, so no test score can be trusted", leak)
