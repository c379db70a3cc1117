import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from histo_jax.metrics import Calibration, binary_scores


def draw(count=20_000, prior=0.5, seed=0):
    """Returns logits that are calibrated for this prior, and labels."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < prior).astype(np.float64)
    # Normals of standard deviation d at +-d^2/2 have the likelihood ratio exp(value).
    logits = rng.normal(size=count) * 2 + (2 * labels - 1) * 2
    return logits + np.log(prior / (1 - prior)), labels


def test_fit_recovers_scale_and_bias():
    logits, labels = draw()
    fitted = Calibration.fit(2.5 * logits - 1, labels)
    assert fitted.scale == pytest.approx(0.4, rel=0.03)
    assert fitted.bias == pytest.approx(0.4, abs=0.05)
    assert fitted.prior == labels.mean()
    np.testing.assert_allclose(fitted.apply(2.5 * logits - 1), logits, rtol=0.05, atol=0.1)


def test_equals_logistic_regression():
    logits, labels = draw(500)
    logits = 3 * logits + 0.5
    fitted = Calibration.fit(logits, labels)
    expected = LogisticRegression(C=np.inf).fit(logits[:, None], labels)
    # The smoothed targets amount to two more examples in 500.
    assert fitted.scale == pytest.approx(expected.coef_[0, 0], rel=0.05)
    assert fitted.bias == pytest.approx(expected.intercept_[0], abs=0.05)


def test_calibration_reduces_nll_and_ece_and_keeps_the_ranking():
    logits, labels = draw(3000)
    bad = 4 * logits + 2
    before = binary_scores(bad, labels)
    after = binary_scores(Calibration.fit(bad, labels).apply(bad), labels)
    assert after["nll"] < 0.6 * before["nll"]
    assert after["ece"] < 0.03 < before["ece"]
    assert after["auc"] == pytest.approx(before["auc"])


@pytest.mark.parametrize("sign", [1, -1])
def test_separated_classes_and_inverted_logits_give_finite_parameters(sign):
    labels = np.array([0.0, 0, 1, 1])
    fitted = Calibration.fit(sign * np.array([-3.0, -2, 2, 3]), labels)
    assert 0 < fitted.scale < 10
    assert abs(fitted.bias) < 10


def test_apply_adjusts_to_another_prior():
    logits, labels = draw(prior=0.5)
    rare, rare_labels = draw(prior=0.1, seed=1)
    rare += np.log(9)  # as from a network trained at a prior of 0.5
    fitted = Calibration.fit(logits, labels)
    assert np.mean(expit(fitted.apply(rare))) > 0.15
    adjusted = fitted.apply(rare, prior=0.1)
    assert np.mean(expit(adjusted)) == pytest.approx(rare_labels.mean(), abs=0.01)
    np.testing.assert_allclose(fitted.apply(logits, prior=labels.mean()), fitted.apply(logits))
