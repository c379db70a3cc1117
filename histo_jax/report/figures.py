"""The figures: pure functions from numbers to SVG."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_curve

from histo_jax.report import backend

with backend.ignored():
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# Of Okabe & Ito's palette, told apart in every kind of colour blindness; lines differ in style too.
NEGATIVE, POSITIVE, LINE = "#0072B2", "#D55E00", "#222222"
_BINS = 15  # those of the calibration error
_STYLE: Any = {
    # Text stays text: smaller, and it can be found.
    "svg.fonttype": "none",
    # The same numbers give the same bytes.
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
    """Opens a figure; at the end its SVG is appended to the list."""
    done: list[str] = []
    with mpl.rc_context():
        mpl.rcdefaults()  # not the user's matplotlibrc and styles
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(4.2, 3.6), layout="constrained")
        yield figure.add_subplot(), done
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        # Without XML's head, so that it can stand inside a page.
        done.append(text.getvalue().partition("<svg")[2].join(("<svg", "")))


def learning_curves(history: pd.DataFrame, used: pd.DataFrame) -> str:
    """Returns the losses of training and validation over the epochs, those of `used` marked."""
    with _axes() as (axes, done):
        # Points, for one epoch alone makes no line.
        epochs, train, validation = (
            history[name] for name in ("epoch", "train_loss", "validation_loss")
        )
        axes.plot(epochs, train, "--", marker=".", color=NEGATIVE, label="training")
        axes.plot(epochs, validation, "-", marker=".", color=POSITIVE, label="validation")
        axes.plot(used["epoch"], used["validation_loss"], "o", color=LINE, label="used")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel="negative log-likelihood", ylim=(0, None))
        axes.legend()
    return done[0]


def roc(logits: np.ndarray, labels: np.ndarray, scores: dict[str, Any]) -> str:
    """Returns the ROC curve with the two operating points."""
    false_alarms, sensitivity, _ = roc_curve(labels, logits)
    with _axes() as (axes, done):
        axes.plot(*_thinned(false_alarms, sensitivity), color=LINE)
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
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
        axes.legend(loc="lower right")
    return done[0]


def precision_recall(probabilities: np.ndarray, labels: np.ndarray, scores: dict[str, Any]) -> str:
    """Returns the precision-recall curve with the operating points, and guessing's precision."""
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    with _axes() as (axes, done):
        axes.plot(*_thinned(recall, precision), color=LINE)
        axes.axhline(labels.mean(), linestyle=":", color="grey", linewidth=1)
        for name, marker, color in (("specificity", "o", NEGATIVE), ("sensitivity", "s", POSITIVE)):
            least = scores.get(f"probability_at_95_{name}")
            if least is not None:
                # A little less, for what reading text may have lost.
                called = probabilities >= least - 1e-12
                axes.plot(
                    called[labels == 1].mean(),
                    labels[called].mean(),
                    marker,
                    color=color,
                    label=f"95% {name}",
                )
        if len(axes.lines) > 2:
            axes.legend(loc="lower left")
        axes.set(xlabel="recall (sensitivity)", ylabel="precision", ylim=(0, 1.02), aspect="equal")
    return done[0]


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> str:
    """Returns how often tumour was there over how probable it was said to be, in 15 bins."""
    true, said = calibration_curve(labels, probabilities, n_bins=_BINS)
    # Its bins, of which it leaves out the empty ones.
    counts = np.bincount(np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], probabilities))
    counts = counts[counts > 0]
    with _axes() as (axes, done):
        axes.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        axes.plot(said, true, "-", color=LINE, linewidth=1)
        axes.scatter(said, true, 8 + 150 * counts / counts.max(), color=NEGATIVE, zorder=3)
        axes.set(xlabel="predicted probability", ylabel="share with tumour", aspect="equal")
    return done[0]


def histogram(probabilities: np.ndarray, labels: np.ndarray) -> str:
    """Returns how many patches of each class have each probability."""
    edges = np.linspace(0, 1, 31).tolist()
    with _axes() as (axes, done):
        for label, color, hatch, name in (
            (0, NEGATIVE, "", "without tumour"),
            (1, POSITIVE, "///", "with tumour"),
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
        axes.set(xlabel="probability of tumour", ylabel="patches")
        axes.legend()
    return done[0]


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points of a curve, evenly along it: no eye tells more apart."""
    if len(x) <= most:
        return x, y
    way = np.append(0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    chosen = np.unique(np.searchsorted(way, np.linspace(0, way[-1], most)))
    return x[chosen], y[chosen]
