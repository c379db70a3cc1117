"""The figures of the report: pure functions from numbers to SVG."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_curve

from histo_jax.report import backend

with backend.isolated():
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# From the palette of Okabe & Ito, which is safe for colour blindness; lines also differ in style.
NEGATIVE, POSITIVE, LINE = "#0072B2", "#D55E00", "#222222"
_BINS = 15  # as in the expected calibration error
_STYLE: Any = {
    # Keeps text as text: smaller, and searchable.
    "svg.fonttype": "none",
    # The same numbers give the same file.
    "svg.hashsalt": "histo_jax",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


@contextmanager
def _axes() -> Iterator[tuple[Axes, list[str]]]:
    """Opens a figure, and appends its SVG to the list at exit."""
    svgs: list[str] = []
    with mpl.rc_context():
        mpl.rcdefaults()  # ignores the matplotlibrc and the styles of the user
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(4.2, 3.6), layout="constrained")
        yield figure.add_subplot(), svgs
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        # Without the XML header, so that it can be embedded in HTML.
        svgs.append(text.getvalue().partition("<svg")[2].join(("<svg", "")))


def learning_curves(history: pd.DataFrame, evaluated: pd.DataFrame) -> str:
    """Draws training and validation loss by epoch.

    Args:
        history: result of `fit`.
        evaluated: its row of the evaluated checkpoint, which is marked; may be empty.
    """
    with _axes() as (axes, svgs):
        # With markers, because a single epoch makes no line.
        epochs, train, validation = (
            history[name] for name in ("epoch", "train_loss", "validation_loss")
        )
        axes.plot(epochs, train, "--", marker=".", color=NEGATIVE, label="training")
        axes.plot(epochs, validation, "-", marker=".", color=POSITIVE, label="validation")
        axes.plot(
            evaluated["epoch"], evaluated["validation_loss"], "o", color=LINE, label="evaluated"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel="negative log-likelihood", ylim=(0, None))
        axes.legend()
    return svgs[0]


def roc(logits: np.ndarray, labels: np.ndarray, scores: dict[str, Any]) -> str:
    """Draws the ROC curve with the operating points at 95% specificity and 95% sensitivity.

    Args:
        logits: float[patches].
        labels: float[patches], 0 or 1.
        scores: result of `evaluate`.
    """
    false_positive_rate, sensitivity, _ = roc_curve(labels, logits)
    with _axes() as (axes, svgs):
        axes.plot(*_downsample(false_positive_rate, sensitivity), color=LINE)
        axes.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        axes.plot(
            0.05,
            scores["sensitivity_at_95_specificity"],
            "o",
            color=NEGATIVE,
            label="95% specificity",
        )
        axes.plot(
            1 - scores["specificity_at_95_sensitivity"],
            0.95,
            "s",
            color=POSITIVE,
            label="95% sensitivity",
        )
        axes.set(
            xlabel="false-positive rate (1 - specificity)", ylabel="sensitivity", aspect="equal"
        )
        axes.legend(loc="lower right")
    return svgs[0]


def precision_recall(probabilities: np.ndarray, labels: np.ndarray, scores: dict[str, Any]) -> str:
    """Draws the precision-recall curve with the operating points, and the precision of chance.

    Args:
        probabilities: float[patches].
        labels: float[patches], 0 or 1.
        scores: result of `evaluate`.
    """
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    with _axes() as (axes, svgs):
        axes.plot(*_downsample(recall, precision), color=LINE)
        axes.axhline(labels.mean(), linestyle=":", color="grey", linewidth=1)
        for name, marker, color in (("specificity", "o", NEGATIVE), ("sensitivity", "s", POSITIVE)):
            threshold = scores.get(f"threshold_at_95_{name}")
            if threshold is not None:
                # The logits, read from text, may have lost their last digit.
                is_positive = probabilities >= threshold - 1e-12
                axes.plot(
                    is_positive[labels == 1].mean(),
                    labels[is_positive].mean(),
                    marker,
                    color=color,
                    label=f"95% {name}",
                )
        if len(axes.lines) > 2:
            axes.legend(loc="lower left")
        axes.set(xlabel="recall (sensitivity)", ylabel="precision", ylim=(0, 1.02), aspect="equal")
    return svgs[0]


def calibration(probabilities: np.ndarray, labels: np.ndarray, classes: tuple[str, str]) -> str:
    """Draws the observed frequency of class 1 against the predicted probability, in 15 bins.

    Args:
        probabilities: float[patches].
        labels: float[patches], 0 or 1.
        classes: names of label 0 and label 1.
    """
    observed, predicted = calibration_curve(labels, probabilities, n_bins=_BINS)
    # The same bins; `calibration_curve` leaves out empty ones.
    counts = np.bincount(np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], probabilities))
    counts = counts[counts > 0]
    with _axes() as (axes, svgs):
        axes.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        axes.plot(predicted, observed, "-", color=LINE, linewidth=1)
        axes.scatter(predicted, observed, 8 + 150 * counts / counts.max(), color=NEGATIVE, zorder=3)
        axes.set(
            xlabel="predicted probability",
            ylabel=f"observed frequency of {_plain(classes[1])}",
            aspect="equal",
        )
    return svgs[0]


def histogram(probabilities: np.ndarray, labels: np.ndarray, classes: tuple[str, str]) -> str:
    """Draws a histogram of the predicted probabilities for each class.

    Args:
        probabilities: float[patches].
        labels: float[patches], 0 or 1.
        classes: names of label 0 and label 1.
    """
    negative, positive = map(_plain, classes)
    edges = np.linspace(0, 1, 31).tolist()
    with _axes() as (axes, svgs):
        for label, color, hatch, name in (
            (0, NEGATIVE, "", negative),
            (1, POSITIVE, "///", positive),
        ):
            axes.hist(
                probabilities[labels == label],
                edges,
                color=color,
                alpha=0.6,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.3,
                label=name,
            )
        axes.set(xlabel=f"predicted probability of {positive}", ylabel="patches")
        axes.legend()
    return svgs[0]


def _plain(name: str) -> str:
    """Returns a name that Matplotlib does not read as a formula."""
    return name.replace("$", r"\$")


def _downsample(
    x: np.ndarray, y: np.ndarray, max_points: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """Returns points of a curve, evenly spaced along it: more points look the same."""
    if len(x) <= max_points:
        return x, y
    length = np.append(0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], max_points)))
    return x[kept], y[kept]
