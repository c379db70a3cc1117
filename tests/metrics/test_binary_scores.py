import math

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from histo_jax.metrics import binary_scores


def test_equals_scikit_learn():
    rng = np.random.default_rng(0)
    labels = (rng.random(500) < 0.3).astype(np.float32)
    logits = (2 * labels - 1 + rng.normal(size=500)).astype(np.float32)
    scores = binary_scores(logits, labels)
    probabilities = expit(logits.astype(np.float64))
    assert scores["count"] == 500
    assert scores["auc"] == pytest.approx(roc_auc_score(labels, probabilities))
    assert scores["nll"] == pytest.approx(log_loss(labels, probabilities))
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, probabilities > 0.5))


def test_extreme_logits_stay_finite():
    scores = binary_scores(np.array([900.0, -900.0]), np.array([0.0, 1.0]))
    assert scores["nll"] == 900


def test_auc_of_one_class_is_not_a_number():
    assert math.isnan(binary_scores(np.zeros(3), np.ones(3))["auc"])
