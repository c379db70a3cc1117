"""Single patches to look at: which, what was said of them, and where the network looked."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image
from scipy.special import expit

from histo_jax.config import Config
from histo_jax.data.records import Prepared
from histo_jax.ensemble import TrainedModel, fold_subsets
from histo_jax.metrics.scores import per_patch_loss
from histo_jax.report.attribution import integrated_gradients

# Patches in each gallery, and in one pass through the network.
_SHOWN = 12
# Of Okabe & Ito's palette, told apart in every kind of colour blindness.
_FOR, _AGAINST = np.array([230, 159, 0]), np.array([0, 114, 178])
_SQUARE = 4

Pixels = UInt8[np.ndarray, "height width 3"]


class Patch(NamedTuple):
    """One patch.

    Attributes:
        id: of the records.
        slide: it comes from; empty where it is not known.
        label: 1 with tumour, 0 without, -1 not known.
        probability: of tumour, calibrated.
        image: its pixels.
        saliency: the patch in grey, orange where it speaks for tumour and blue where against;
            None: not computed.
    """

    id: str
    slide: str
    label: int
    probability: float
    image: Pixels
    saliency: Pixels | None


def galleries(table: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    """Returns which rows of `predictions.read` are worth a look, by the gallery's title."""
    logits = table["logit"].to_numpy()
    labels = table["label"].to_numpy()
    by_loss = np.argsort(-per_patch_loss(logits, labels), kind="stable")
    return {
        "Highest loss": by_loss[is_wrong(logits, labels)[by_loss]][:_SHOWN],
        "Most uncertain": np.argsort(np.abs(logits), kind="stable")[:_SHOWN],
        "Random sample": np.random.default_rng(seed).permutation(len(table))[:_SHOWN],
    }


def is_wrong(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns which patches are called otherwise than labelled at probability 0.5."""
    return (logits > 0) != (labels == 1)


def gather(
    prepared: Prepared,
    split: str,
    rows: np.ndarray,
    trained: list[TrainedModel],
    logits: Float[np.ndarray, " rows"] | None = None,
    owners: Int[np.ndarray, " rows"] | None = None,
) -> list[Patch]:
    """Reads some records, and looks at them with the networks.

    Args:
        prepared: the records.
        split: of the records.
        rows: int[rows], which of them.
        trained: the networks, whose mean is told; with none of them there is no saliency.
        logits: calibrated; None = what the networks say.
        owners: for each row the number of the one network that is asked; None = all are.
    """
    if owners is not None:
        found: dict[int, Patch] = {}
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            given = None if logits is None else logits[places]
            some = gather(prepared, split, rows[places], [trained[owner]], given)
            found |= zip(places.tolist(), some, strict=True)
        return [found[place] for place in range(len(rows))]
    images = prepared.records(split, rows).images(np.arange(len(rows)))
    pictures: list[Pixels] | list[None] = [None] * len(rows)
    if trained:
        said, maps = look(trained, images)
        logits = said if logits is None else logits
        pictures = [_colour(image, heat) for image, heat in zip(images, maps, strict=True)]
    assert logits is not None
    table = prepared.tables[split].iloc[rows]
    columns = (table[name].tolist() for name in ("id", "slide", "label"))
    return [
        Patch(*patch)
        for patch in zip(*columns, expit(logits).tolist(), images, pictures, strict=True)
    ]


def owners(
    trained: list[TrainedModel],
    config: Config,
    prepared: Prepared,
    scores: dict[str, Any],
    rows: np.ndarray,
) -> np.ndarray | None:
    """Returns which network has scored each row out of fold; None where all have scored all."""
    if not (trained and scores.get("out_of_fold")):
        return None
    folds = fold_subsets(trained, config, prepared)
    return np.argmax([np.isin(rows, subsets.validation.rows) for subsets in folds], axis=0)


def look(
    trained: list[TrainedModel], images: UInt8[np.ndarray, "rows height width 3"]
) -> tuple[Float[np.ndarray, " rows"], Float32[np.ndarray, "rows height width"]]:
    """Returns calibrated logits and what each pixel adds to them, means over the networks."""
    logits, maps = [], []
    for member in trained:
        compiled = jax.jit(functools.partial(integrated_gradients, member.model))
        for first in range(0, len(images), _SHOWN):
            # Of one size, so that there is one program; what is too much is cut off below.
            part = np.resize(images[first : first + _SHOWN], (_SHOWN, *images.shape[1:]))
            said, marked = compiled(member.weights, part)
            logits.append(member.calibration.apply(np.asarray(said)))
            maps.append(member.calibration.scale * np.asarray(marked))

    def mean(parts: list[np.ndarray]) -> np.ndarray:
        whole = np.stack(parts).reshape(len(trained), -1, *parts[0].shape[1:])
        return whole[:, : len(images)].mean(0)

    return mean(logits), mean(maps).astype(np.float32)


def _colour(image: Pixels, adds: Float32[np.ndarray, "height width"]) -> Pixels:
    """Colours by squares, with soft edges: single pixels would be noise to the eye.

    The strongest squares of each patch have full colour, however little they add.
    """
    height, width = (size // _SQUARE for size in adds.shape)
    squares = adds.reshape(height, _SQUARE, width, _SQUARE).sum((1, 3))
    # The strongest few alone would leave the rest dark.
    strength = np.clip(squares / max(float(np.quantile(abs(squares), 0.98)), 1e-6), -1, 1)
    soft = Image.fromarray(strength).resize(adds.shape[::-1], Image.Resampling.BILINEAR)
    signed = np.asarray(soft)[..., None]
    share = 0.7 * abs(signed)
    color = np.where(signed > 0, _FOR, _AGAINST)
    return ((1 - share) * image.mean(-1, keepdims=True) + share * color).astype(np.uint8)
