import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from histo_jax.metrics import Calibration, binary_scores


def draw(count=20_000, prior=0.5, seed=0):
    """Logits that are calibrated at that prior, and labels."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < prior).astype(np.float64)
    # Normals of deviation d at +-d^2/2 have the likelihood ratio exp(value).
    logits = rng.normal(size=count) * 2 + (2 * labels - 1) * 2
    return logits + np.log(prior / (1 - prior)), labels


def test_finds_scale_and_shift_back():
    logits, labels = draw()
    found = Calibration.fit(2.5 * logits - 1, labels)
    assert found.scale == pytest.approx(0.4, rel=0.03)
    assert found.shift == pytest.approx(0.4, abs=0.05)
    assert found.prior == labels.mean()
    np.testing.assert_allclose(found.apply(2.5 * logits - 1), logits, rtol=0.05, atol=0.1)


def test_equals_logistic_regression():
    logits, labels = draw(500)
    logits = 3 * logits + 0.5
    found = Calibration.fit(logits, labels)
    wanted = LogisticRegression(C=np.inf).fit(logits[:, None], labels)
    # Platt's prior moves it by two examples in 500.
    assert found.scale == pytest.approx(wanted.coef_[0, 0], rel=0.05)
    assert found.shift == pytest.approx(wanted.intercept_[0], abs=0.05)


def test_lowers_the_loss_and_the_calibration_error_and_keeps_the_ranking():
    logits, labels = draw(3000)
    bad = 4 * logits + 2
    before = binary_scores(bad, labels)
    after = binary_scores(Calibration.fit(bad, labels).apply(bad), labels)
    assert after["nll"] < 0.6 * before["nll"]
    assert after["ece"] < 0.03 < before["ece"]
    assert after["auc"] == pytest.approx(before["auc"])


@pytest.mark.parametrize("sign", [1, -1])
def test_classes_that_are_apart_and_a_network_that_is_wrong_give_finite_values(sign):
    labels = np.array([0.0, 0, 1, 1])
    found = Calibration.fit(sign * np.array([-3.0, -2, 2, 3]), labels)
    assert 0 < found.scale < 10
    assert abs(found.shift) < 10


def test_another_prior_is_taken_in_by_bayes_rule():
    logits, labels = draw(prior=0.5)
    rare, rare_labels = draw(prior=0.1, seed=1)
    rare += np.log(9)  # what a network trained on one half would say
    found = Calibration.fit(logits, labels)
    assert np.mean(expit(found.apply(rare))) > 0.15
    moved = found.apply(rare, prior=0.1)
    assert np.mean(expit(moved)) == pytest.approx(rare_labels.mean(), abs=0.01)
    np.testing.assert_allclose(found.apply(logits, prior=labels.mean()), found.apply(logits))
