"""95% confidence intervals and paired comparisons, by bootstrap over slides or over patches."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Shaped

from histo_jax.metrics.scores import Values, Weights, weighted_scores

RESAMPLES = 2000
FEW_SLIDES = 20  # with fewer, an interval is unreliable
_CHUNK_ELEMENTS = 3_000_000  # weights, 24 MB: faster than all at once, which overflow the caches
_QUANTILES = (0.025, 0.975)

Groups = Shaped[np.ndarray, " examples"]


def _resamples(groups: Groups | None, examples: int, seed: int) -> Iterator[Weights]:
    """Yields chunks of resamples: how often each example counts in each of them.

    Whole groups are drawn with replacement (the cluster bootstrap: Field & Welsh, "Bootstrapping
    clustered data", 2007); without groups, single examples are. The variation between groups cannot
    be estimated from one group: all weights are then 0.
    """
    rng = np.random.default_rng(seed)
    group_index = np.unique(groups, return_inverse=True)[1] if groups is not None else None
    count = examples if group_index is None else int(group_index.max()) + 1
    chunk = max(1, _CHUNK_ELEMENTS // examples)
    if count == 1:
        yield np.zeros((1, examples))
        return
    for first in range(0, RESAMPLES, chunk):
        rows = min(chunk, RESAMPLES - first)
        drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        weights = weights if group_index is None else weights[:, group_index]
        yield weights.astype(np.float64)


def _interval(values: np.ndarray) -> list[float]:
    """Returns the percentile interval, without resamples whose score is undefined (nan)."""
    if np.isnan(values).all():
        return [float("nan"), float("nan")]
    return np.nanquantile(values, _QUANTILES).tolist()


def few_note(count: int, unit: str) -> str:
    """Returns the caveat for intervals over few slides or patients; '' = there is none.

    Args:
        count: slides, patients or patches that were resampled.
        unit: which of these, in the plural.
    """
    if unit == "patches" or count >= FEW_SLIDES:
        return ""
    return (
        f"the 95% intervals are over {count} {unit} only; with fewer than {FEW_SLIDES} they are "
        "unreliable"
    )


def bootstrap(
    scores: Callable[[Weights], Mapping[str, np.ndarray]],
    groups: Groups | None,
    examples: int,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Returns the 95% percentile interval [low, high] of each score.

    Args:
        scores: returns the scores for each weighting of the examples, by name; nan = undefined.
        groups: see `confidence_intervals`.
        examples: their number.
        seed: seed of the 2,000 resamples.
    """
    chunks = [scores(weights) for weights in _resamples(groups, examples, seed)]
    return {
        name: _interval(np.concatenate([chunk[name] for chunk in chunks])) for name in chunks[0]
    }


def confidence_intervals(
    logits: Values, labels: Values, groups: Groups | None, seed: int = 0
) -> dict[str, list[float]]:
    """Returns the 95% confidence interval [low, high] of each score of `weighted_scores`.

    These are percentile intervals; for `ece` the basic bootstrap interval (Davison & Hinkley,
    "Bootstrap Methods", 1997, 5.2), clipped to contain the score: noise biases the calibration
    error upwards, and a second time in each resample.

    Args:
        logits: float[examples], of the positive class.
        labels: float[examples], 0 or 1.
        groups: the slide of each example; None: examples are resampled one by one.
        seed: seed of the 2,000 resamples.

    Returns:
        Low and high end of each score's interval; nan where there is only one group.
    """
    intervals = bootstrap(
        lambda weights: weighted_scores(logits, labels, weights), groups, len(logits), seed
    )
    ece = float(weighted_scores(logits, labels, np.ones((1, len(logits))))["ece"][0])
    low, high = intervals["ece"]
    intervals["ece"] = [np.maximum(0.0, 2 * ece - high), np.maximum(ece, 2 * ece - low)]
    return intervals


def difference(
    logits: tuple[Values, Values], labels: Values, groups: Groups | None, seed: int = 0
) -> dict[str, dict[str, float | list[float]]]:
    """Compares two classifiers on the same examples by the paired bootstrap.

    Args:
        logits: logits of the first and of the second classifier, float[examples] each.
        labels: float[examples], 0 or 1.
        groups: the slide of each example; None: examples are resampled one by one.
        seed: seed of the 2,000 resamples.

    Returns:
        For each score: `difference`, second minus first; its 95% `interval`; and the two-sided
        p-value `p`, at least 1 / 2,000.
    """
    once = np.ones((1, len(labels)))
    first, second = (weighted_scores(values, labels, once) for values in logits)
    chunks = []
    for weights in _resamples(groups, len(labels), seed):
        one, other = (weighted_scores(values, labels, weights) for values in logits)
        chunks.append({name: other[name] - one[name] for name in one})
    result: dict[str, dict[str, float | list[float]]] = {}
    for name in first:
        values = np.concatenate([chunk[name] for chunk in chunks])
        # A score is undefined in resamples that lack one of the classes.
        defined = values[~np.isnan(values)]
        tails = [np.mean(defined <= 0), np.mean(defined >= 0)] if len(defined) else [np.nan]
        result[name] = {
            "difference": float(second[name][0] - first[name][0]),
            "interval": _interval(values),
            "p": float(np.clip(2 * np.min(tails), 1 / RESAMPLES, 1)),
        }
    return result
