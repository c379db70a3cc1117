"""Scores of a two-class classifier, for many weightings of the same examples at once."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy.special import expit

_BINS = 15  # of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", 2017
# Rounding must not exclude the threshold that meets the level of 95% exactly.
_FEW, _MOST = 0.05 + 1e-9, 0.95 - 1e-9

Values = Float[np.ndarray, " examples"]
Weights = Float[np.ndarray, "weightings examples"]


class _Ranked(NamedTuple):
    """Positives and negatives, weighted, at or above each distinct logit, from the highest on."""

    positives: np.ndarray
    negatives: np.ndarray


def _rank(logits: Values, labels: Values, weights: Weights) -> _Ranked:
    order = np.argsort(-logits, kind="stable")
    last_of_equals = np.append(np.diff(logits[order]) != 0, True)
    weights = weights[:, order]
    sums = [np.cumsum(weights * (labels[order] == label), 1)[:, last_of_equals] for label in (1, 0)]
    return _Ranked(*(np.pad(values, ((0, 0), (1, 0))) for values in sums))


def _ranking_scores(ranked: _Ranked) -> dict[str, np.ndarray]:
    positives, negatives = ranked
    sensitivity = positives / positives[:, -1:]
    false_alarms = negatives / negatives[:, -1:]
    precision = positives[:, 1:] / np.maximum(positives[:, 1:] + negatives[:, 1:], 1e-300)
    middle = (sensitivity[:, 1:] + sensitivity[:, :-1]) / 2
    reached = np.where(false_alarms <= _FEW, sensitivity, 0).max(1)
    spared = np.where(sensitivity >= _MOST, 1 - false_alarms, 0).max(1)
    # A comparison with what is not a number is false, and would pass for a score of 0.
    has_both = (positives[:, -1] > 0) & (negatives[:, -1] > 0)
    return {
        "auc": (np.diff(false_alarms) * middle).sum(1),
        "average_precision": (np.diff(sensitivity) * precision).sum(1),
        "sensitivity_at_95_specificity": np.where(has_both, reached, np.nan),
        "specificity_at_95_sensitivity": np.where(has_both, spared, np.nan),
    }


def operating_points(logits: Values, labels: Values) -> dict[str, float]:
    """Returns the probabilities from which on to call a patch positive for the two 95% scores.

    Args:
        logits: calibrated.
        labels: 0 or 1, both of which occur.

    Returns:
        `probability_at_95_specificity` and `probability_at_95_sensitivity`; nan where only calling
        nothing positive reaches the level.
    """
    logits = logits.astype(np.float64)
    positives, negatives = (v[0] for v in _rank(logits, labels, np.ones((1, len(logits)))))
    sensitivity, false_alarms = positives / positives[-1], negatives / negatives[-1]
    # The first entry is that of calling none.
    called_from = np.append(np.nan, expit(np.unique(logits)[::-1]))
    best = np.where(false_alarms <= _FEW, sensitivity, -1).argmax()
    return {
        "probability_at_95_specificity": float(called_from[best]),
        "probability_at_95_sensitivity": float(called_from[(sensitivity >= _MOST).argmax()]),
    }


def per_patch_loss(logits: Values, labels: Shaped[np.ndarray, " examples"]) -> Values:
    """Returns each example's negative log-likelihood, nats."""
    # -log sigmoid(z) = log(1 + exp(-z)) for label 1, and of -z for label 0, without overflow.
    return np.logaddexp(0, np.where(labels == 1, -logits, logits))


def weighted_scores(logits: Values, labels: Values, weights: Weights) -> dict[str, np.ndarray]:
    """Returns each score as float64[weightings]; nan where a weighting lacks a class it needs.

    Args:
        logits: of the positive class.
        labels: 0 or 1.
        weights: how often each example counts.

    Returns:
        `auc`, area under the ROC curve; `average_precision`; `sensitivity_at_95_specificity` and
        the reverse, each the best threshold's; `nll`, mean negative log-likelihood in nats;
        `brier`, mean squared error of the probability; `accuracy` at probability 0.5; `ece`,
        expected calibration error over 15 bins of equal width.
    """
    logits = logits.astype(np.float64)
    is_positive = labels == 1
    probabilities = expit(logits)
    sums = {
        "nll": per_patch_loss(logits, labels),
        "brier": (probabilities - is_positive) ** 2,
        "accuracy": ((logits > 0) == is_positive).astype(np.float64),
    }
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    gaps = np.zeros((len(logits), _BINS))
    gaps[np.arange(len(logits)), bins] = probabilities - is_positive
    with np.errstate(invalid="ignore", divide="ignore"):
        count = weights.sum(1)
        scores = _ranking_scores(_rank(logits, labels, weights))
        scores |= {name: weights @ values / count for name, values in sums.items()}
        scores["ece"] = np.abs(weights @ gaps).sum(1) / count
    return scores


def binary_scores(logits: Values, labels: Values) -> dict[str, float]:
    """Returns `count` of examples and the scores of `weighted_scores`, each example once."""
    scores = weighted_scores(logits, labels, np.ones((1, len(logits))))
    return {"count": len(logits)} | {name: float(value[0]) for name, value in scores.items()}
