import math

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
    roc_curve,
)

from histo_jax.metrics import binary_scores, operating_points
from histo_jax.metrics.scores import weighted_scores


def draw(count, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.3).astype(np.float32)
    logits = (2 * labels - 1 + rng.normal(size=count)).astype(np.float32)
    return (np.round(logits) if ties else logits), labels


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_scores_equal_scikit_learn(ties):
    logits, labels = draw(500, ties=ties)
    weights = np.random.default_rng(1).integers(0, 4, (3, 500)).astype(np.float64)
    weights[0] = 1
    scores = weighted_scores(logits, labels, weights)
    probabilities = expit(logits.astype(np.float64))
    for row, weight in enumerate(weights):
        fpr, tpr, _ = roc_curve(labels, logits, sample_weight=weight, drop_intermediate=False)
        expected = {
            "auc": roc_auc_score(labels, logits, sample_weight=weight),
            "average_precision": average_precision_score(labels, logits, sample_weight=weight),
            "nll": log_loss(labels, probabilities, sample_weight=weight),
            "brier": brier_score_loss(labels, probabilities, sample_weight=weight),
            "accuracy": accuracy_score(labels, logits > 0, sample_weight=weight),
            "sensitivity_at_95_specificity": tpr[fpr <= 0.05].max(),
            "specificity_at_95_sensitivity": 1 - fpr[tpr >= 0.95].min(),
        }
        for name, value in expected.items():
            assert scores[name][row] == pytest.approx(value, rel=1e-9), name
    assert binary_scores(logits, labels)["auc"] == pytest.approx(scores["auc"][0])
    assert binary_scores(logits, labels)["count"] == 500


@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_reach_the_scores(ties):
    logits, labels = draw(500, ties=ties)
    scores, points = binary_scores(logits, labels), operating_points(logits, labels)
    probabilities = expit(logits.astype(np.float64))
    is_positive = probabilities >= points["threshold_at_95_specificity"]
    assert is_positive[labels == 0].mean() <= 0.05
    assert is_positive[labels == 1].mean() == pytest.approx(scores["sensitivity_at_95_specificity"])
    is_positive = probabilities >= points["threshold_at_95_sensitivity"]
    assert is_positive[labels == 1].mean() >= 0.95
    assert (~is_positive)[labels == 0].mean() == pytest.approx(
        scores["specificity_at_95_sensitivity"]
    )


def test_no_threshold_where_only_an_all_negative_prediction_reaches_the_level():
    points = operating_points(np.array([3.0, 2.0, 1.0]), np.array([0.0, 1.0, 1.0]))
    assert math.isnan(points["threshold_at_95_specificity"])
    assert points["threshold_at_95_sensitivity"] == expit(1.0)


def test_ranking_scores_need_both_classes():
    weights = np.array([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    scores = weighted_scores(np.array([1.0, 2, 3]), np.array([0.0, 1, 1]), weights)
    for name in ("auc", "sensitivity_at_95_specificity", "specificity_at_95_sensitivity"):
        assert np.isnan(scores[name]).all(), name


def test_calibration_error_by_hand():
    # Two bins: 0.9 three times, two of them correct; 0.1 once, incorrect.
    logits = np.log(np.array([0.9, 0.9, 0.9, 0.1]) / np.array([0.1, 0.1, 0.1, 0.9]))
    scores = binary_scores(logits, np.array([1.0, 1, 0, 1]))
    assert scores["ece"] == pytest.approx((abs(3 * 0.9 - 2) + abs(0.1 - 1)) / 4)


def test_extreme_logits_stay_finite():
    scores = binary_scores(np.array([900.0, -900.0]), np.array([0.0, 1.0]))
    assert scores["nll"] == 900
    assert all(map(math.isfinite, scores.values()))


def test_auc_of_one_class_is_nan():
    assert math.isnan(binary_scores(np.zeros(3), np.ones(3))["auc"])
