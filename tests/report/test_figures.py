"""The figures of the report."""

import contextlib

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_curve

from histo_jax.metrics import binary_scores, operating_points
from histo_jax.report import figures

CLASSES = ("no tumour", "tumour")


@pytest.mark.parametrize("curve", [roc_curve, precision_recall_curve])
def test_downsampling_moves_a_curve_by_less_than_a_pixel(curve):
    rng = np.random.default_rng(0)
    labels = rng.random(10_000) < 0.5
    first, second, _ = curve(labels, labels + rng.normal(size=10_000))
    x, y = (first, second) if curve is roc_curve else (second, first)
    sampled = figures._downsample(x, y)
    assert len(sampled[0]) <= 400
    assert (sampled[0][0], sampled[1][0]) == (x[0], y[0])
    assert (sampled[0][-1], sampled[1][-1]) == (x[-1], y[-1])
    points = np.stack([x, y], 1)
    kept = np.stack(sampled, 1)
    distance = np.abs(points[:, None] - kept[None]).sum(2).min(1)
    assert distance.max() < 0.01


@pytest.fixture
def axes(monkeypatch):
    """The axes that the figures draw, instead of SVG."""
    all_axes = []

    @contextlib.contextmanager
    def open_axes():
        all_axes.append(Figure().add_subplot())
        yield all_axes[-1], [""]

    monkeypatch.setattr(figures, "_axes", open_axes)
    return all_axes


def lines(one):
    return {line.get_label(): line.get_xydata() for line in one.lines}


def test_curves_equal_scikit_learn_and_points_equal_the_scores(axes):
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.4).astype(np.float64)
    logits = labels + rng.normal(size=300)
    probabilities = expit(logits)
    scores = binary_scores(logits, labels) | operating_points(logits, labels)
    figures.roc(logits, labels, scores)
    figures.precision_recall(probabilities, labels, scores)
    figures.calibration(probabilities, labels, CLASSES)
    figures.histogram(probabilities, labels, CLASSES)
    roc, recall, calibration, histogram = axes

    false_positive_rate, sensitivity, _ = roc_curve(labels, logits)
    np.testing.assert_array_equal(
        roc.lines[0].get_xydata(), np.stack([false_positive_rate, sensitivity], 1)
    )
    assert (roc.get_xlabel(), roc.get_ylabel()) == (
        "false-positive rate (1 - specificity)",
        "sensitivity",
    )
    for level in ("specificity", "sensitivity"):
        is_positive = probabilities >= scores[f"threshold_at_95_{level}"]
        reached = is_positive[labels == 1].mean()
        # Drawn at exactly 95%, which a whole number of patches may not reach.
        point = lines(roc)[f"95% {level}"][0]
        assert point.tolist() == pytest.approx([is_positive[labels == 0].mean(), reached], abs=0.01)
        point = lines(recall)[f"95% {level}"][0]
        assert point.tolist() == pytest.approx([reached, labels[is_positive].mean()])

    precision, recalls, _ = precision_recall_curve(labels, probabilities)
    np.testing.assert_array_equal(recall.lines[0].get_xydata(), np.stack([recalls, precision], 1))
    assert recall.lines[1].get_ydata()[0] == labels.mean()
    assert (recall.get_xlabel(), recall.get_ylabel()) == ("recall (sensitivity)", "precision")

    observed, predicted = calibration_curve(labels, probabilities, n_bins=15)
    np.testing.assert_array_equal(
        calibration.lines[1].get_xydata(), np.stack([predicted, observed], 1)
    )
    labels_of_axes = (calibration.get_xlabel(), calibration.get_ylabel())
    assert labels_of_axes == ("predicted probability", "observed frequency of tumour")

    for label, bars in enumerate(histogram.containers):
        expected, _ = np.histogram(probabilities[labels == label], np.linspace(0, 1, 31))
        assert [bar.get_height() for bar in bars] == expected.tolist()
        assert bars[0].get_label() == ("no tumour", "tumour")[label]


def test_learning_curves_mark_the_evaluated_epoch(axes):
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "step": [7, 14, 21],
            "train_loss": [0.7, 0.5, 0.3],
            "validation_loss": [0.6, 0.4, 0.45],
        }
    )
    figures.learning_curves(history, history[history["step"] == 21])
    curves = lines(axes[0])
    assert curves["training"].tolist() == [[1, 0.7], [2, 0.5], [3, 0.3]]
    assert curves["validation"].tolist() == [[1, 0.6], [2, 0.4], [3, 0.45]]
    assert curves["evaluated"].tolist() == [[3, 0.45]]


def test_figures_do_not_depend_on_the_matplotlib_style():
    drawn = figures.calibration(np.arange(16) / 15, np.arange(16) % 2.0, CLASSES)
    with mpl.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "black"}):
        restyled = figures.calibration(np.arange(16) / 15, np.arange(16) % 2.0, CLASSES)
        assert mpl.rcParams["font.size"] == 30
    assert drawn == restyled


def test_probabilities_on_the_edges_of_bins_are_counted():
    assert "<svg" in figures.calibration(np.arange(16) / 15, np.arange(16) % 2.0, CLASSES)
