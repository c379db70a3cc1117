"""Numbers that the page shows in tables: pure functions of scores and predictions."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from sklearn.metrics import roc_auc_score

from histo_jax.metrics.scores import per_patch_loss

Probabilities = Float[np.ndarray, " patches"]
Labels = Shaped[np.ndarray, " patches"]

# Steps of the threshold slider, from 0 to 100%.
SLIDER_STEPS = 1000


def slide_scores(table: pd.DataFrame, probabilities: Probabilities) -> list[dict[str, Any]]:
    """Returns one row per slide, highest loss first.

    Args:
        table: `label`, `slide` and calibrated `logit` of each patch.
        probabilities: calibrated probability of each patch.

    Returns:
        `slide`; number of `patches`; fraction with `tumour`; `auc`, None if the slide has patches
        of one class only; `accuracy`; mean `nll`.
    """
    loss = per_patch_loss(table["logit"].to_numpy(), table["label"].to_numpy())
    rows = []
    for slide, places in table.groupby("slide").indices.items():
        labels, predicted = table["label"].to_numpy()[places], probabilities[places]
        has_both_classes = 0 < labels.sum() < len(labels)
        rows.append(
            {
                "slide": slide,
                "patches": len(places),
                "tumour": float(labels.mean()),
                "auc": float(roc_auc_score(labels, predicted)) if has_both_classes else None,
                "accuracy": float(((predicted > 0.5) == (labels == 1)).mean()),
                "nll": float(loss[places].mean()),
            }
        )
    return sorted(rows, key=lambda row: -row["nll"])


def predicted_positives(probabilities: Probabilities, labels: Labels) -> dict[str, list[int]]:
    """Returns for each position of the slider how many patches are classified as tumour.

    Args:
        probabilities: calibrated.
        labels: 0 or 1.

    Returns:
        `positives`, of the patches with tumour; `negatives`, of those without.
    """
    thresholds = np.arange(SLIDER_STEPS + 1) / SLIDER_STEPS
    by_class = {"positives": probabilities[labels == 1], "negatives": probabilities[labels == 0]}
    return {
        name: [int((values >= threshold).sum()) for threshold in thresholds]
        for name, values in by_class.items()
    }


def _operating_points(scores: dict[str, Any]) -> Iterator[tuple[str, float, Callable[..., Any]]]:
    """Yields the name, the threshold, and the rounding with which its 95% still hold."""
    for name, rounding in (("specificity", np.ceil), ("sensitivity", np.floor)):
        threshold = scores.get(f"threshold_at_95_{name}")
        if threshold is not None:
            yield name, threshold, rounding


def threshold_texts(scores: dict[str, Any]) -> dict[str, str]:
    """Returns the threshold of each score that has one, as text.

    Thresholds close to 0 or 1 have three significant digits of the distance to it.
    """
    texts = {}
    for name, threshold, rounding in _operating_points(scores):
        distance = max(min(threshold, 1 - threshold), 1e-12)
        digits = 2 - int(np.floor(np.log10(distance)))
        other = "sensitivity" if name == "specificity" else "specificity"
        rounded = rounding(threshold * 10**digits) / 10**digits
        texts[f"{other}_at_95_{name}"] = f"{rounded:.{digits}f}"
    return texts


def slider_positions(scores: dict[str, Any]) -> dict[str, int]:
    """Returns the position of the slider for each operating point, by its name.

    Leaves out positions at either end, which classify all patches alike.
    """
    positions = {
        f"95% {name}": int(rounding(SLIDER_STEPS * threshold))
        for name, threshold, rounding in _operating_points(scores)
    }
    return {name: position for name, position in positions.items() if 0 < position < SLIDER_STEPS}


def compare_with_color(split: str, scores: dict[str, Any], color_auc: float | None) -> str | None:
    """Compares the network with the colour-histogram baseline.

    Args:
        split: the evaluated split; the baseline is scored on the validation split only.
        scores: result of `evaluate`.
        color_auc: AUC of the baseline; None = not known.

    Returns:
        'better', if the baseline is below the confidence interval of the network; 'worse', if the
        network does not exceed the baseline; 'inconclusive'; or None: cannot be compared.
    """
    if color_auc is None or split != "validation":
        return None
    if color_auc >= scores["auc"]:
        return "worse"
    is_significant = scores["auc_low"] is not None and scores["auc_low"] > color_auc
    return "better" if is_significant else "inconclusive"
