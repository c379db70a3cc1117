"""Confidence intervals: coverage, and comparison of equal and of different classifiers."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from histo_jax.metrics import binary_scores, confidence_intervals, difference, intervals
from histo_jax.metrics.scores import weighted_scores


def draw(slides, patches, seed):
    """Returns patches of slides that differ in difficulty and in their fraction of tumour."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(slides), patches)
    prevalence = rng.beta(2, 2, slides)[groups]
    labels = (rng.random(len(groups)) < prevalence).astype(np.float64)
    difficulty = rng.normal(0, 0.5, slides)[groups]
    logits = (2 * labels - 1) * (1.2 + difficulty) + rng.normal(0, 0.4, slides)[groups]
    return logits + rng.normal(size=len(groups)), labels, groups


def coverage(slides, repeats):
    """Returns the fraction of intervals that contain the true AUC, that of very many slides."""
    true = roc_auc_score(*draw(20_000, 10, 123)[1::-1])
    inside = 0
    for repeat in range(repeats):
        logits, labels, groups = draw(slides, 10, repeat)
        low, high = confidence_intervals(logits, labels, groups, repeat)["auc"]
        inside += low <= true <= high
    return inside / repeats


def test_intervals_have_95_percent_coverage(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)  # enough for a 95% interval
    assert 0.92 <= coverage(slides=60, repeats=200) <= 0.98


def test_resampling_slides_gives_wider_intervals_than_resampling_patches():
    logits, labels, groups = draw(30, 50, 0)
    by_slide = confidence_intervals(logits, labels, groups)
    by_patch = confidence_intervals(logits, labels, None)
    for name in ("auc", "nll"):
        assert np.ptp(by_slide[name]) > 1.5 * np.ptp(by_patch[name])
    assert confidence_intervals(logits, labels, groups) == by_slide
    assert confidence_intervals(logits, labels, groups, seed=1) != by_slide


def test_one_slide_gives_no_interval():
    logits, labels, _ = draw(30, 50, 0)
    one = np.zeros(len(labels))
    assert np.isnan(list(confidence_intervals(logits, labels, one).values())).all()
    for values in difference((logits, logits + 0.5 * labels), labels, one).values():
        assert np.isnan([*values["interval"], values["p"]]).all()


@pytest.mark.parametrize(("scale", "minimum"), [(1.0, 0), (2.5, 0.05)])
def test_the_ece_interval_corrects_the_bias_of_resampling(scale, minimum, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2.5, 500)
    labels = (rng.random(500) < expit(logits)).astype(np.float64)
    error = binary_scores(scale * logits, labels)["ece"]
    low, high = confidence_intervals(scale * logits, labels, None)["ece"]
    drawn = [
        weighted_scores(scale * logits, labels, weights)["ece"]
        for weights in intervals._resamples(None, 500, 0)
    ]
    ends = np.quantile(np.concatenate(drawn), [0.975, 0.025])
    # The percentile interval would exclude the error of a calibrated network.
    assert (ends[1] > error) == (scale == 1)
    assert minimum <= low <= error <= high
    assert (low, high) == pytest.approx(np.maximum(2 * error - ends, [0, error]))


def test_resamples_consist_of_whole_slides(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 50)
    groups = np.array(["b", "a", "b", "c", "c", "c"])
    weights = np.concatenate(list(intervals._resamples(groups, 6, 0)))
    assert weights.shape == (50, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    assert (weights[:, [1, 2, 3]].sum(1) == 3).all()  # three of three slides
    assert len(np.unique(weights, axis=0)) > 5


def test_a_classifier_compared_with_itself_has_no_difference():
    logits, labels, groups = draw(20, 20, 0)
    for values in difference((logits, logits), labels, groups).values():
        assert values == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}


def test_a_better_classifier_is_significantly_better():
    logits, labels, groups = draw(40, 30, 0)
    better = logits + 0.5 * (2 * labels - 1)
    result = difference((logits, better), labels, groups)["auc"]
    expected = roc_auc_score(labels, better) - roc_auc_score(labels, logits)
    assert result["difference"] == pytest.approx(expected)
    assert 0 < result["interval"][0] < expected < result["interval"][1]
    assert result["p"] <= 1 / 1000


def test_resamples_without_a_score_do_not_count_for_p(monkeypatch):
    labels = np.array([0.0, 0.0, 1.0, 1.0])
    first, second = np.array([0.0, 2.0, 1.0, 1.0]), np.array([2.0, 0.0, 1.0, 1.0])
    # The first resample favours one, the second the other, and the rest have one class only.
    weights = np.array([[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], np.float64)
    monkeypatch.setattr(intervals, "_resamples", lambda *_: [weights])
    assert intervals.difference((first, second), labels, None)["auc"]["p"] == 1
