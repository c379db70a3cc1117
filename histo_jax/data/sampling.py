"""Draws a balanced sample of labelled examples, and selects those for validation.

scikit-learn takes half a second to import: it is imported where it divides.
"""

import logging

import numpy as np

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
    labels: np.ndarray, groups: np.ndarray | None, unit: str, data: DataConfig, seed: int
) -> np.ndarray:
    """Selects the examples for validation.

    Args:
        labels: int[n], 0 or 1.
        groups: the group of each example, which is not divided; None divides by image.
        unit: what a group is, 'slide' or 'patient'.
        data: `validation_fraction` and `fold`.
        seed: of the division.

    Returns:
        bool[n], true for validation.
    """
    if data.fold:
        return _fold(labels, groups, unit, data.fold, seed)
    if groups is None:
        return _validation_by_image(labels, data.validation_fraction, seed)
    return _validation_by_group(labels, groups, unit, data.validation_fraction, seed)


def _fold(
    labels: np.ndarray, groups: np.ndarray | None, unit: str, fold: str, seed: int
) -> np.ndarray:
    """Returns bool[n], true in one fold; checks all folds, so that no later run of them fails."""
    number, folds = parse_fold(fold)
    counts = {f"patches of label {label}": (labels == label).sum() for label in (0, 1)}
    if groups is not None:
        counts[f"{unit}s"] = len(np.unique(groups))
    for what, count in counts.items():
        if count < folds:
            raise DataError(
                f"config.data.fold = {fold!r} needs {folds} {what}, and there are {count}: choose "
                "fewer folds"
            )
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(
        folds, shuffle=True, random_state=seed
    )
    divided = [rows for _, rows in splitter.split(labels, labels, groups)]
    for other, rows in enumerate(divided, start=1):
        if len(np.unique(labels[rows])) < 2:
            raise DataError(
                f"fold {other} of config.data.fold = {fold!r} has patches of one class only: "
                "choose fewer folds, or another config.data.split_seed"
            )
    return np.isin(np.arange(len(labels)), divided[number - 1])


def _validation_by_image(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    from sklearn.model_selection import train_test_split

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


def _validation_by_group(
    labels: np.ndarray, groups: np.ndarray, unit: str, fraction: float, seed: int
) -> np.ndarray:
    """Returns bool[n], true for whole groups: about `fraction` of the patches, classes balanced.

    scikit-learn makes equal folds only, so `fraction` is approximated by some of several folds.
    """
    count = len(np.unique(groups))
    if count < 2:
        raise DataError(
            {
                "slide": "all patches come from 1 slide: set --config.data.split_by=image",
                "patient": "all patches come from 1 patient, or from patients that share slides: "
                "set --config.data.split_by=slide, or image",
            }[unit]
        )
    _, folds, used = min(
        (abs(used / folds - fraction), folds, used)
        for folds in range(2, min(20, count) + 1)
        for used in range(1, folds)
    )
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    inside = np.zeros(len(labels), bool)
    for _, rows in list(splitter.split(labels, labels, groups))[:used]:
        inside[rows] = True
    return inside
