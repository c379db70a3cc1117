"""Who trains and who validates."""

import dataclasses
import hashlib
import logging
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from histo_jax.config import Config
from histo_jax.data.builder import SQUARES, SUMS
from histo_jax.data.example import IMAGE_SIZE
from histo_jax.errors import ExpectedError

log = logging.getLogger("histo_jax")


class Side(NamedTuple):
    """Examples on one side.

    Attributes:
        records: name of the records that they lie in.
        rows: int64[n], ascending rows of these records.
    """

    records: str
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sides:
    """Who trains, who validates, who tests.

    Attributes:
        train: examples to train on.
        validation: examples that choose the checkpoint; none of them is in `train`.
        test: examples to predict; None where the data has none.
        by: 'slide' where no slide is on two sides, 'image' where only no image is.
    """

    train: Side
    validation: Side
    test: Side | None
    by: str

    @property
    def honest(self) -> bool:
        """Whether the validation score speaks of slides that training has not seen."""
        return self.by == "slide"


OPTIMISTIC = (
    "the score is optimistic: slides are not known, not used or on both sides, so neighbours of "
    "one slide train and are scored"
)


def make_sides(tables: dict[str, pd.DataFrame], config: Config) -> Sides:
    """Draws the balanced sample and divides it, by `config.seed` alone; official splits rule.

    Args:
        tables: per split the columns `id`, `label` (0 or 1) and `slide` ('' = not known); see
            `builder.Prepared`. Where there is a 'validation', it validates whole.
        config: `data.samples_per_class`, `data.validation_fraction` and `data.split_by` rule.

    Raises:
        ExpectedError: slides are asked for but not known, or a side lacks a class.
    """
    data, table = config.data, tables["train"]
    all_labels, slides = table["label"].to_numpy(), table["slide"].to_numpy()
    candidates = np.arange(len(table))
    official = "validation" in tables
    slides_known = bool((slides != "").any())
    if data.split_by == "slide" and not (slides_known or official):
        raise ExpectedError(
            "config.data.split_by = 'slide', but this data names no slides: give "
            "config.data.slide_map, or use 'auto' or 'image'"
        )
    by = "slide" if official or (slides_known and data.split_by != "image") else "image"
    if by == "slide" and not official:
        # An example of an unknown slide has no side on which it is safe.
        candidates = np.flatnonzero(slides != "")
    rows = candidates[_sample(all_labels[candidates], data.samples_per_class, config.seed)]
    labels = all_labels[rows]
    if official and share(table.iloc[rows], tables["validation"]):
        by = "image"
    if official:
        validation = Side("validation", np.arange(len(tables["validation"])))
        train = Side("train", rows)
    else:
        fraction = data.validation_fraction
        inside = (
            _validation_by_slide(labels, slides[rows], fraction, config.seed)
            if by == "slide"
            else _validation_by_image(labels, fraction, config.seed)
        )
        train, validation = Side("train", rows[~inside]), Side("train", rows[inside])
    test = Side("test", np.arange(len(tables["test"]))) if "test" in tables else None
    for name, side in (("training", train), ("validation", validation)):
        counts = np.bincount(tables[side.records]["label"].iloc[side.rows], minlength=2)
        if counts.min() == 0:
            raise ExpectedError(
                f"the {name} set has {counts[0]} patches without and {counts[1]} with tumour, and "
                "needs both classes: give more patches of the other"
            )
    return Sides(train, validation, test, by)


def share(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Tells whether two parts of tables have a slide, or pixels of more than one colour, in common.

    Args:
        first: columns as in `make_sides`.
        second: likewise.
    """
    slides = set(first["slide"]) & set(second["slide"]) - {""}
    return bool(slides) or not shared_ids(first, second).empty


def shared_ids(first: pd.DataFrame, second: pd.DataFrame) -> pd.Series:
    """Returns the ids of `first` that `second` has, too, but for patches of one colour.

    Empty glass of two slides can be equal by chance. For the arguments see `share`.
    """
    found = first[first["id"].isin(second["id"])]
    sums, squares = (found[list(names)].to_numpy() for names in (SUMS, SQUARES))
    one_colour = (sums**2 == IMAGE_SIZE * IMAGE_SIZE * squares).all(axis=1)
    return found["id"][~one_colour]


def _sample(labels: np.ndarray, per_class: int | None, seed: int) -> np.ndarray:
    """Rows of at most `per_class` examples of each class, ascending."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        if per_class is not None and per_class > len(rows):
            log.warning(
                "class %d has %d patches, fewer than config.data.samples_per_class = %d: "
                "all of them are taken",
                label, len(rows), per_class,
            )  # fmt: skip
        elif per_class is not None:
            rows = rng.choice(rows, per_class, replace=False)
        chosen.append(rows)
    return np.sort(np.concatenate(chosen))


def _validation_by_image(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    inside = np.zeros(len(labels), bool)
    try:
        _, rows = train_test_split(
            np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise ExpectedError(
            f"{len(labels)} patches cannot be divided by config.data.validation_fraction = "
            f"{fraction} with both classes on both sides ({error})"
        ) from None
    inside[rows] = True
    return inside


def _validation_by_slide(
    labels: np.ndarray, slides: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Whole slides, as many and as balanced as they allow.

    scikit-learn divides into equal folds only, so `fraction` is met by some of several folds.
    """
    count = len(np.unique(slides))
    if count < 2:
        raise ExpectedError(
            f"all patches come from {count} slide: set --config.data.split_by=image"
        )
    _, folds, wanted = min(
        (abs(some / folds - fraction), folds, some)
        for folds in range(2, min(20, count) + 1)
        for some in range(1, folds)
    )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    inside = np.zeros(len(labels), bool)
    for _, rows in list(splitter.split(labels, labels, slides))[:wanted]:
        inside[rows] = True
    return inside


def normalisation(table: pd.DataFrame, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel over all pixels of the given examples.

    Exact integer sums make the result independent of the order.

    Returns:
        Two float32[3], in units of the full range (0 = black, 1 = full).
    """
    pixels = len(rows) * IMAGE_SIZE * IMAGE_SIZE
    chosen = table.iloc[rows]
    mean = chosen[list(SUMS)].sum().to_numpy(np.float64) / pixels
    square = chosen[list(SQUARES)].sum().to_numpy(np.float64) / pixels
    # A training set of one flat colour would otherwise divide by zero.
    deviation = np.sqrt(np.maximum(square - mean**2, 1.0))
    return (mean / 255).astype(np.float32), (deviation / 255).astype(np.float32)


def fingerprint(tables: dict[str, pd.DataFrame], sides: Sides, config: Config) -> str:
    """Returns a SHA-256 of everything that decides which example comes at which step."""
    digest = hashlib.sha256(f"{config.seed} {config.fit.batch_size}".encode())
    for side in (sides.train, sides.validation):
        digest.update("\n".join(["", *tables[side.records]["id"].iloc[side.rows]]).encode())
    return digest.hexdigest()


def check_fingerprint(
    known: str, tables: dict[str, pd.DataFrame], sides: Sides, config: Config
) -> None:
    """Refuses examples that are not those a run has trained on.

    Args:
        known: `fingerprint` of the run's examples.
        tables: see `make_sides`.
        sides: drawn from them.
        config: that of the run.

    Raises:
        ExpectedError: names the folder.
    """
    if known != fingerprint(tables, sides, config):
        raise ExpectedError(
            f"{config.data.tfds_dir} no longer holds the examples that this run began with, or "
            "config.data.slide_map has changed: restore them or choose another --workdir"
        )


def refuse_leak(tables: dict[str, pd.DataFrame], sides: Sides, allow: bool) -> None:
    """Refuses to train on pixels that are also in the test set; the ids are the pixels' SHA-1.

    Patches of a single colour are passed over.

    Raises:
        ExpectedError: there are some, and `allow` is false.
    """
    if sides.test is None:
        return
    train = tables[sides.train.records].iloc[sides.train.rows]
    shared = shared_ids(train, tables[sides.test.records].iloc[sides.test.rows])
    if shared.empty:
        return
    found = f"{len(shared)} training patches are also test patches, the first is {shared.iloc[0]}"
    if not allow:
        raise ExpectedError(
            f"{found}: remove them, or set --config.data.allow_leak=true and trust no test score"
        )
    log.warning("LEAK: %s; config.data.allow_leak is set, so no test score can be trusted", found)
