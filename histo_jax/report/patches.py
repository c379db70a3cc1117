"""Patches shown in a report: which ones, their probabilities, and their attribution."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image
from scipy.special import expit

from histo_jax.config import Config
from histo_jax.data.records import Prepared
from histo_jax.ensemble import fold_subsets
from histo_jax.metrics.scores import per_patch_loss
from histo_jax.predictor import Predictor
from histo_jax.report.attribution import attribute

_SHOWN = 12  # patches in each gallery
# From the palette of Okabe & Ito, which is safe for colour blindness.
_FOR, _AGAINST = np.array([230, 159, 0]), np.array([0, 114, 178])
_SQUARE = 4  # pixels at 96x96; larger patches have 32 squares along each edge

Pixels = UInt8[np.ndarray, "height width 3"]


class Patch(NamedTuple):
    """One patch.

    Attributes:
        id: as in the records.
        slide: the slide it was cut from; empty if not known.
        label: 1 positive, 0 negative, -1 not known.
        probability: calibrated probability of label 1.
        image: its pixels.
        attribution: the patch in grey, orange where pixels raise the logit and blue where they
            lower it; None = not computed.
        path: the file that holds it; '' = none.
    """

    id: str
    slide: str
    label: int
    probability: float
    image: Pixels
    attribution: Pixels | None
    path: str = ""


def galleries(table: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    """Returns the rows of each gallery, by its title.

    Args:
        table: result of `evaluation_files.read`.
        seed: of the random sample.
    """
    logits = table["logit"].to_numpy()
    labels = table["label"].to_numpy()
    by_loss = np.argsort(-per_patch_loss(logits, labels), kind="stable")
    return {
        "Highest loss": by_loss[is_wrong(logits, labels)[by_loss]][:_SHOWN],
        "Most uncertain": np.argsort(np.abs(logits), kind="stable")[:_SHOWN],
        "Random sample": np.random.default_rng(seed).permutation(len(table))[:_SHOWN],
    }


def is_wrong(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns which patches are misclassified at probability 0.5."""
    return (logits > 0) != (labels == 1)


def gather(
    prepared: Prepared,
    split: str,
    rows: np.ndarray,
    predictor: Predictor | None,
    logits: Float[np.ndarray, " rows"] | None = None,
    networks: Int[np.ndarray, " rows"] | None = None,
) -> list[Patch]:
    """Reads some records and computes their attribution.

    Args:
        prepared: the records.
        split: of the records.
        rows: int[rows], rows of these records.
        predictor: None = no attribution; `logits` are needed then.
        logits: calibrated; None = computed by `predictor`.
        networks: for each row the number of the one network of `predictor` to use; None = all.
    """
    if predictor and networks is not None:
        return _gather_by_network(prepared, split, rows, predictor, logits, networks)
    images = prepared.records(split, rows).images(np.arange(len(rows)))
    pictures: list[Pixels] | list[None] = [None] * len(rows)
    if predictor:
        if logits is None:
            logits = predictor.logits(images)
        maps = attribute(predictor, images)
        pictures = [draw_attribution(*pair) for pair in zip(images, maps, strict=True)]
    assert logits is not None
    table = prepared.tables[split].iloc[rows]
    columns = (table[name].tolist() for name in ("id", "slide", "label"))
    paths = table["path"] if "path" in table else [""] * len(rows)
    return [
        Patch(*patch)
        for patch in zip(*columns, expit(logits).tolist(), images, pictures, paths, strict=True)
    ]


def _gather_by_network(
    prepared: Prepared,
    split: str,
    rows: np.ndarray,
    predictor: Predictor,
    logits: Float[np.ndarray, " rows"] | None,
    networks: Int[np.ndarray, " rows"],
) -> list[Patch]:
    """Does what `gather` does, each row by its own network."""
    patches: dict[int, Patch] = {}
    for number in np.unique(networks).tolist():
        positions = np.flatnonzero(networks == number)
        own = None if logits is None else logits[positions]
        some = gather(prepared, split, rows[positions], predictor.select(number), own)
        patches |= zip(positions.tolist(), some, strict=True)
    return [patches[position] for position in range(len(rows))]


def scoring_networks(
    predictor: Predictor | None,
    config: Config,
    prepared: Prepared,
    scores: dict[str, Any],
    rows: np.ndarray,
) -> np.ndarray | None:
    """Returns the number of the network that has scored each row; None if all have scored it.

    Args:
        predictor: the evaluated networks; None = not available.
        config: settings of the command.
        prepared: the records.
        scores: result of `evaluate`.
        rows: int[rows], rows of the training records.
    """
    if not (predictor and scores.get("out_of_fold")):
        return None
    folds = fold_subsets(predictor.trained, config, prepared)
    return np.argmax([np.isin(rows, subsets.validation.rows) for subsets in folds], axis=0)


def draw_attribution(image: Pixels, maps: Float32[np.ndarray, "height width"]) -> Pixels:
    """Colours by squares with soft edges, because single pixels look like noise.

    The strongest squares of each patch have full colour, however little they contribute.
    """
    edge = max(_SQUARE, len(maps) // 32)
    height, width = (size // edge for size in maps.shape)
    squares = maps.reshape(height, edge, width, edge).sum((1, 3))
    # Scaled by a quantile: scaled by the maximum, all but a few squares would be dark.
    strength = np.clip(squares / max(float(np.quantile(abs(squares), 0.98)), 1e-6), -1, 1)
    soft = Image.fromarray(strength).resize(maps.shape[::-1], Image.Resampling.BILINEAR)
    signed = np.asarray(soft)[..., None]
    opacity = 0.7 * abs(signed)
    color = np.where(signed > 0, _FOR, _AGAINST)
    return ((1 - opacity) * image.mean(-1, keepdims=True) + opacity * color).astype(np.uint8)
