"""Intervals: what they cover, and what they say of equal and of different classifiers."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from histo_jax.metrics import binary_scores, difference, intervals, with_intervals
from histo_jax.metrics.scores import weighted_scores


def draw(slides, patches, seed):
    """Patches of slides that differ in how hard they are, and in how much tumour they have."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(slides), patches)
    share = rng.beta(2, 2, slides)[groups]
    labels = (rng.random(len(groups)) < share).astype(np.float64)
    hardness = rng.normal(0, 0.5, slides)[groups]
    logits = (2 * labels - 1) * (1.2 + hardness) + rng.normal(0, 0.4, slides)[groups]
    return logits + rng.normal(size=len(groups)), labels, groups


def coverage(slides, repeats):
    """Share of the intervals that hold the true AUC, that of very many slides."""
    true = roc_auc_score(*draw(40_000, 10, 123)[1::-1])
    inside = 0
    for repeat in range(repeats):
        logits, labels, groups = draw(slides, 10, repeat)
        low, high = with_intervals(logits, labels, groups, repeat)["auc"]
        inside += low <= true <= high
    return inside / repeats


def test_nineteen_of_twenty_intervals_hold_the_truth(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 300)  # enough for a 95% interval's ends
    assert 0.92 <= coverage(slides=100, repeats=400) <= 0.98


def test_slides_widen_the_interval_that_patches_would_give():
    logits, labels, groups = draw(30, 50, 0)
    by_slide = with_intervals(logits, labels, groups)
    by_patch = with_intervals(logits, labels, None)
    for name in ("auc", "nll"):
        assert np.ptp(by_slide[name]) > 1.5 * np.ptp(by_patch[name])
    again = with_intervals(logits, labels, groups)
    assert again == by_slide
    assert with_intervals(logits, labels, groups, seed=1) != by_slide


def test_one_slide_says_nothing_of_how_slides_differ():
    logits, labels, _ = draw(30, 50, 0)
    one = np.zeros(len(labels))
    assert np.isnan(list(with_intervals(logits, labels, one).values())).all()
    for values in difference((logits, logits + 0.5 * labels), labels, one).values():
        assert np.isnan([*values["interval"], values["p"]]).all()


@pytest.mark.parametrize(("scale", "few"), [(1.0, 0), (2.5, 0.05)])
def test_the_interval_of_the_calibration_error_does_not_add_chance_twice(scale, few, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2.5, 500)
    labels = (rng.random(500) < expit(logits)).astype(np.float64)
    error = binary_scores(scale * logits, labels)["ece"]
    low, high = with_intervals(scale * logits, labels, None)["ece"]
    drawn = [
        weighted_scores(scale * logits, labels, weights)["ece"]
        for weights in intervals._resamples(None, 500, 0)
    ]
    ends = np.quantile(np.concatenate(drawn), [0.975, 0.025])
    # Resamples alone would put the error of a calibrated network outside.
    assert (ends[1] > error) == (scale == 1)
    assert few <= low <= error <= high
    assert (low, high) == pytest.approx(np.maximum(2 * error - ends, [0, error]))


def test_a_resample_is_whole_slides(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 50)
    groups = np.array(["b", "a", "b", "c", "c", "c"])
    weights = np.concatenate(list(intervals._resamples(groups, 6, 0)))
    assert weights.shape == (50, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    assert (weights[:, [1, 2, 3]].sum(1) == 3).all()  # three slides are drawn
    assert len(np.unique(weights, axis=0)) > 5


def test_a_classifier_does_not_differ_from_itself():
    logits, labels, groups = draw(20, 20, 0)
    for values in difference((logits, logits), labels, groups).values():
        assert values == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}


def test_a_better_classifier_is_found_out():
    logits, labels, groups = draw(40, 30, 0)
    better = logits + 0.5 * (2 * labels - 1)
    found = difference((logits, better), labels, groups)["auc"]
    wanted = roc_auc_score(labels, better) - roc_auc_score(labels, logits)
    assert found["difference"] == pytest.approx(wanted)
    assert 0 < found["interval"][0] < wanted < found["interval"][1]
    assert found["p"] <= 1 / 1000


def test_resamples_without_a_score_say_nothing_of_chance(monkeypatch):
    labels = np.array([0.0, 0.0, 1.0, 1.0])
    first, second = np.array([0.0, 2.0, 1.0, 1.0]), np.array([2.0, 0.0, 1.0, 1.0])
    # The first resample favours one, the second the other, and the rest have one class only.
    weights = np.array([[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], np.float64)
    monkeypatch.setattr(intervals, "_resamples", lambda *_: [weights])
    assert intervals.difference((first, second), labels, None)["auc"]["p"] == 1
