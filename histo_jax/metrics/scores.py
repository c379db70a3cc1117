"""Scores of a binary classifier, for many weightings of the same examples at once."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy.special import expit

# Bins of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", 2017.
_BINS = 15
# The tolerance keeps rounding from excluding a threshold that reaches 95% exactly.
_MAX_FALSE_POSITIVE_RATE, _MIN_SENSITIVITY = 0.05 + 1e-9, 0.95 - 1e-9

Values = Float[np.ndarray, " examples"]
Weights = Float[np.ndarray, "weightings examples"]


class _CumulativeCounts(NamedTuple):
    """Weighted positives and negatives at or above each distinct logit, in descending order.

    The first column is zero: a threshold above all logits.
    """

    positives: np.ndarray
    negatives: np.ndarray


def _count_above(logits: Values, labels: Values, weights: Weights) -> _CumulativeCounts:
    order = np.argsort(-logits, kind="stable")
    is_last_of_ties = np.append(np.diff(logits[order]) != 0, True)
    weights = weights[:, order]
    sums = [
        np.cumsum(weights * (labels[order] == label), 1)[:, is_last_of_ties] for label in (1, 0)
    ]
    return _CumulativeCounts(*(np.pad(values, ((0, 0), (1, 0))) for values in sums))


def _ranking_scores(counts: _CumulativeCounts) -> dict[str, np.ndarray]:
    positives, negatives = counts
    sensitivity = positives / positives[:, -1:]
    false_positive_rate = negatives / negatives[:, -1:]
    precision = positives[:, 1:] / np.maximum(positives[:, 1:] + negatives[:, 1:], 1e-300)
    mean_sensitivity = (sensitivity[:, 1:] + sensitivity[:, :-1]) / 2
    is_specific = false_positive_rate <= _MAX_FALSE_POSITIVE_RATE
    is_sensitive = sensitivity >= _MIN_SENSITIVITY
    best_sensitivity = np.where(is_specific, sensitivity, 0).max(1)
    best_specificity = np.where(is_sensitive, 1 - false_positive_rate, 0).max(1)
    # Comparisons with nan are false and would give a score of 0 instead of nan.
    has_both = (positives[:, -1] > 0) & (negatives[:, -1] > 0)
    return {
        "auc": (np.diff(false_positive_rate) * mean_sensitivity).sum(1),
        "average_precision": (np.diff(sensitivity) * precision).sum(1),
        "sensitivity_at_95_specificity": np.where(has_both, best_sensitivity, np.nan),
        "specificity_at_95_sensitivity": np.where(has_both, best_specificity, np.nan),
    }


def operating_points(logits: Values, labels: Values) -> dict[str, float]:
    """Returns the decision thresholds at 95% specificity and at 95% sensitivity.

    A patch is classified as positive if its probability is at or above the threshold.

    Args:
        logits: float[examples], calibrated.
        labels: float[examples], 0 or 1; both must occur.

    Returns:
        The probabilities `threshold_at_95_specificity` and `threshold_at_95_sensitivity`; nan where
        the level is only reached by classifying nothing as positive.
    """
    logits = logits.astype(np.float64)
    positives, negatives = (v[0] for v in _count_above(logits, labels, np.ones((1, len(logits)))))
    sensitivity, false_positive_rate = positives / positives[-1], negatives / negatives[-1]
    # The first entry classifies nothing as positive.
    thresholds = np.append(np.nan, expit(np.unique(logits)[::-1]))
    is_specific = false_positive_rate <= _MAX_FALSE_POSITIVE_RATE
    is_sensitive = sensitivity >= _MIN_SENSITIVITY
    return {
        "threshold_at_95_specificity": float(
            thresholds[np.where(is_specific, sensitivity, -1).argmax()]
        ),
        "threshold_at_95_sensitivity": float(thresholds[is_sensitive.argmax()]),
    }


def per_patch_loss(logits: Values, labels: Shaped[np.ndarray, " examples"]) -> Values:
    """Returns the negative log-likelihood of each example, in nats."""
    # -log sigmoid(z) = log(1 + exp(-z)) for label 1 and log(1 + exp(z)) for label 0; no overflow.
    return np.logaddexp(0, np.where(labels == 1, -logits, logits))


def weighted_scores(logits: Values, labels: Values, weights: Weights) -> dict[str, np.ndarray]:
    """Returns each score for each weighting.

    Args:
        logits: float[examples], of the positive class.
        labels: float[examples], 0 or 1.
        weights: float[weightings, examples], how often each example counts.

    Returns:
        float64[weightings] by name; nan where a weighting lacks a class that the score needs.
        `auc`, area under the ROC curve; `average_precision`; `sensitivity_at_95_specificity` and
        `specificity_at_95_sensitivity`, at the best threshold; `nll`, mean negative log-likelihood
        in nats; `brier`, mean squared error of the probability; `accuracy` at probability 0.5;
        `ece`, expected calibration error over 15 bins of equal width.
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
        scores = _ranking_scores(_count_above(logits, labels, weights))
        scores |= {name: weights @ values / count for name, values in sums.items()}
        scores["ece"] = np.abs(weights @ gaps).sum(1) / count
    return scores


def binary_scores(logits: Values, labels: Values) -> dict[str, float]:
    """Returns the number of examples, `count`, and the scores of `weighted_scores`, unweighted."""
    scores = weighted_scores(logits, labels, np.ones((1, len(logits))))
    return {"count": len(logits)} | {name: float(value[0]) for name, value in scores.items()}
