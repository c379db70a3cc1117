"""Draws a balanced sample of labelled examples, and selects those for validation."""

import logging

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from histo_jax.config import DataConfig
from histo_jax.config_values import parse_fold
from histo_jax.errors import DataError

log = logging.getLogger("histo_jax")


def sample(labels: np.ndarray, per_class: int | None, seed: int) -> np.ndarray:
    """Returns the rows of at most `per_class` examples of each class, ascending."""
    rng = np.random.default_rng(seed)
    chosen = []
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        if per_class is not None and per_class > len(rows):
            log.warning(
                "class %d has %d patches, fewer than config.data.samples_per_class = %d: "
                "all of them are used",
                label,
                len(rows),
                per_class,
            )
        elif per_class is not None:
            rows = rng.choice(rows, per_class, replace=False)
        chosen.append(rows)
    return np.sort(np.concatenate(chosen))


def select_validation(
    labels: np.ndarray, slides: np.ndarray | None, data: DataConfig, seed: int
) -> np.ndarray:
    """Returns bool[n], true for validation; by slide where `slides` are given."""
    if data.fold:
        return _fold(labels, slides, data.fold, seed)
    if slides is None:
        return _validation_by_image(labels, data.validation_fraction, seed)
    return _validation_by_slide(labels, slides, data.validation_fraction, seed)


def _fold(labels: np.ndarray, slides: np.ndarray | None, fold: str, seed: int) -> np.ndarray:
    """Returns bool[n], true in one fold; checks all folds, so that no later run of them fails."""
    number, folds = parse_fold(fold)
    counts = {"patches without": (labels == 0).sum(), "patches with tumour": (labels == 1).sum()}
    if slides is not None:
        counts["slides"] = len(np.unique(slides))
    for what, count in counts.items():
        if count < folds:
            raise DataError(
                f"config.data.fold = {fold!r} needs {folds} {what}, and there are {count}: choose "
                "fewer folds"
            )
    splitter = (StratifiedKFold if slides is None else StratifiedGroupKFold)(
        folds, shuffle=True, random_state=seed
    )
    divided = [rows for _, rows in splitter.split(labels, labels, slides)]
    for other, rows in enumerate(divided, start=1):
        if len(np.unique(labels[rows])) < 2:
            raise DataError(
                f"fold {other} of config.data.fold = {fold!r} has patches of one class only: "
                "choose fewer folds, or another config.data.split_seed"
            )
    return np.isin(np.arange(len(labels)), divided[number - 1])


def _validation_by_image(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    inside = np.zeros(len(labels), bool)
    try:
        _, rows = train_test_split(
            np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise DataError(
            f"{len(labels)} patches cannot be divided by config.data.validation_fraction = "
            f"{fraction} with both classes in training and validation ({error})"
        ) from None
    inside[rows] = True
    return inside


def _validation_by_slide(
    labels: np.ndarray, slides: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Returns bool[n], true for whole slides: about `fraction` of the patches, classes balanced.

    scikit-learn makes equal folds only, so `fraction` is approximated by some of several folds.
    """
    count = len(np.unique(slides))
    if count < 2:
        raise DataError(f"all patches come from {count} slide: set --config.data.split_by=image")
    _, folds, used = min(
        (abs(used / folds - fraction), folds, used)
        for folds in range(2, min(20, count) + 1)
        for used in range(1, folds)
    )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    inside = np.zeros(len(labels), bool)
    for _, rows in list(splitter.split(labels, labels, slides))[:used]:
        inside[rows] = True
    return inside
