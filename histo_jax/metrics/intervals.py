"""95% intervals by the bootstrap over slides, whose patches are alike, or over patches."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped

from histo_jax.metrics.scores import Values, Weights, weighted_scores

RESAMPLES = 2000
_AT_ONCE = 3_000_000  # weights, 24 MB, which the caches like better than all at once
_QUANTILES = (0.025, 0.975)

Groups = Shaped[np.ndarray, " examples"]


def _resamples(groups: Groups | None, examples: int, seed: int) -> Iterator[Weights]:
    """Yields weights of the examples, in parts: how often each one's group was drawn.

    Groups are drawn with replacement, as many as there are (Field & Welsh, "Bootstrapping clustered
    data", 2007, the cluster bootstrap); without groups, examples are. One group alone says nothing
    of how groups differ: nothing is drawn.
    """
    rng = np.random.default_rng(seed)
    members = np.unique(groups, return_inverse=True)[1] if groups is not None else None
    count = examples if members is None else int(members.max()) + 1
    part = max(1, _AT_ONCE // examples)
    if count == 1:
        yield np.zeros((1, examples))
        return
    for first in range(0, RESAMPLES, part):
        rows = min(part, RESAMPLES - first)
        drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        weights = weights if members is None else weights[:, members]
        yield weights.astype(np.float64)


def _interval(values: np.ndarray) -> list[float]:
    """The middle 95%; resamples without one of the classes have no score and are left out."""
    if np.isnan(values).all():
        return [float("nan"), float("nan")]
    return np.nanquantile(values, _QUANTILES).tolist()


def with_intervals(
    logits: Values, labels: Values, groups: Groups | None, seed: int = 0
) -> dict[str, list[float]]:
    """Returns for each score of `weighted_scores` the ends of its 95% interval.

    Args:
        logits: of the positive class.
        labels: 0 or 1.
        groups: the slide of each example; None draws examples.
        seed: of the 2,000 resamples.

    Returns:
        The middle 95% of the resamples' scores; for `ece`, which chance only adds to, and once more
        in each resample, the basic bootstrap's ends (Davison & Hinkley, "Bootstrap Methods", 1997,
        5.2), but never below the score itself. nan where there is one group only.
    """
    parts = [
        weighted_scores(logits, labels, weights)
        for weights in _resamples(groups, len(logits), seed)
    ]
    ends = {name: _interval(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    ece = float(weighted_scores(logits, labels, np.ones((1, len(logits))))["ece"][0])
    low, high = ends["ece"]
    ends["ece"] = [np.maximum(0.0, 2 * ece - high), np.maximum(ece, 2 * ece - low)]
    return ends


def difference(
    logits: tuple[Values, Values], labels: Values, groups: Groups | None, seed: int = 0
) -> dict[str, dict[str, float | list[float]]]:
    """Compares two classifiers on the same examples, resampled alike (paired bootstrap).

    Args:
        logits: of the first and of the second.
        labels: 0 or 1.
        groups: the slide of each example; None draws examples.
        seed: of the 2,000 resamples.

    Returns:
        For each score `difference`, second minus first, its 95% `interval`, and `p`, two-sided:
        twice the share of resamples on the other side of zero, at least 1 / 2,000.
    """
    once = np.ones((1, len(labels)))
    first, second = (weighted_scores(values, labels, once) for values in logits)
    parts = []
    for weights in _resamples(groups, len(labels), seed):
        one, other = (weighted_scores(values, labels, weights) for values in logits)
        parts.append({name: other[name] - one[name] for name in one})
    result: dict[str, dict[str, float | list[float]]] = {}
    for name in first:
        values = np.concatenate([part[name] for part in parts])
        # Resamples without one of the classes have no score.
        told = values[~np.isnan(values)]
        tails = [np.mean(told <= 0), np.mean(told >= 0)] if len(told) else [np.nan]
        result[name] = {
            "difference": float(second[name][0] - first[name][0]),
            "interval": _interval(values),
            "p": float(np.clip(2 * np.min(tails), 1 / RESAMPLES, 1)),
        }
    return result
