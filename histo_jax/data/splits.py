"""Who trains and who validates."""

import dataclasses
import fractions
import hashlib
import logging

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from histo_jax.config import Config
from histo_jax.data.builder import SQUARES, SUMS
from histo_jax.data.example import IMAGE_SIZE
from histo_jax.errors import ExpectedError

log = logging.getLogger("histo_jax")


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of a table, on two sides.

    Attributes:
        train: int64[n], ascending rows of the examples to train on.
        validation: int64[m], ascending rows, none of them in `train`.
        by: 'slide' where no slide is on both sides, 'image' where only no image is.
    """

    train: np.ndarray
    validation: np.ndarray
    by: str


def make_split(table: pd.DataFrame, config: Config) -> Split:
    """Draws the balanced sample and divides it, by `config.seed` alone.

    Args:
        table: columns `label` (0 or 1) and `slide` ('' = not known).
        config: `data.samples_per_class`, `data.validation_fraction` and `data.split_by` rule.

    Raises:
        ExpectedError: slides are asked for but not known, or a side lacks a class.
    """
    data = config.data
    slides_known = bool((table["slide"] != "").all())
    if data.split_by == "slide" and not slides_known:
        raise ExpectedError(
            "config.data.split_by = 'slide', but this data names no slides: use 'auto' or 'image'"
        )
    by = "slide" if slides_known and data.split_by != "image" else "image"
    rows = _sample(table["label"].to_numpy(), data.samples_per_class, config.seed)
    labels = table["label"].to_numpy()[rows]
    if by == "slide":
        inside = _validation_by_slide(
            labels, table["slide"].to_numpy()[rows], data.validation_fraction, config.seed
        )
    else:
        inside = _validation_by_image(labels, data.validation_fraction, config.seed)
    split = Split(train=rows[~inside], validation=rows[inside], by=by)
    for side, its_rows in (("training", split.train), ("validation", split.validation)):
        counts = np.bincount(table["label"].to_numpy()[its_rows], minlength=2)
        if counts.min() == 0:
            raise ExpectedError(
                f"the {side} set has {counts[0]} patches without and {counts[1]} with tumour, and "
                "needs both classes: give more patches of the other"
            )
    return split


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
    share = fractions.Fraction(fraction).limit_denominator(min(20, count))
    wanted, folds = max(share.numerator, 1), max(share.denominator, 2)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    inside = np.zeros(len(labels), bool)
    for _, rows in list(splitter.split(labels, labels, slides))[: min(wanted, folds - 1)]:
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


def fingerprint(table: pd.DataFrame, split: Split, config: Config) -> str:
    """Returns a SHA-256 of everything that decides which example comes at which step."""
    digest = hashlib.sha256(f"{config.seed} {config.fit.batch_size}".encode())
    for rows in (split.train, split.validation):
        digest.update("\n".join(["", *table["id"].iloc[rows]]).encode())
    return digest.hexdigest()
