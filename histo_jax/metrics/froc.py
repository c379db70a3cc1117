"""Free-response ROC (FROC): the lesions that are found against the false positives of a slide.

As in CAMELYON16: Ehteshami Bejnordi et al., "Diagnostic Assessment of Deep Learning Algorithms for
Detection of Lymph Node Metastases in Women With Breast Cancer", JAMA 318(22), 2017, and the
evaluation code that the challenge has published.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

# Average false positives of a slide at which the sensitivity is taken.
FALSE_POSITIVES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# Micrometres. Isolated tumour cells measure up to 200; the challenge widens each annotation by 37.5
# on each side.
MIN_DIAMETER = 275.0


class Lesions(NamedTuple):
    """The lesions of all slides.

    Attributes:
        slide: index of its slide.
        diameter: in micrometres.
    """

    slide: Int[np.ndarray, " lesions"]
    diameter: Float[np.ndarray, " lesions"]


class Detections(NamedTuple):
    """The detections of all slides.

    Attributes:
        slide: index of its slide.
        score: the higher, the more suspicious.
        lesion: index of the lesion that it is in, -1 = none.
    """

    slide: Int[np.ndarray, " detections"]
    score: Float[np.ndarray, " detections"]
    lesion: Int[np.ndarray, " detections"]


class _Events(NamedTuple):
    """Detections that count, in descending order of their scores.

    Attributes:
        slide: index of its slide.
        is_hit: whether it finds a lesion; the others are false positives.
        is_last_of_ties: whether the next one has a lower score.
    """

    slide: np.ndarray
    is_hit: np.ndarray
    is_last_of_ties: np.ndarray


def weighted_froc(
    detections: Detections,
    lesions: Lesions,
    weights: Float[np.ndarray, "weightings slides"],
    min_diameter: float = MIN_DIAMETER,
) -> dict[str, Float[np.ndarray, " weightings"]]:
    """Returns the sensitivities of the FROC curve and their mean, for each weighting of the slides.

    A lesion is found at the highest score of the detections in it. A detection in no lesion is a
    false positive. Between two points of the curve the sensitivity is interpolated linearly, and
    beyond the last one it stays.

    Args:
        detections: of all slides.
        lesions: likewise.
        weights: how often each slide counts.
        min_diameter: a smaller lesion is isolated tumour cells: it need not be found, and
            detections in it are no false positives.

    Returns:
        `froc`, the mean of the others, and `sensitivity_at_0.25_fp` to `sensitivity_at_8_fp`, the
        fraction of lesions that are found at as many false positives per slide on average; nan
        where a weighting has no lesions.
    """
    is_counted = lesions.diameter >= min_diameter
    counts = np.bincount(lesions.slide[is_counted], minlength=weights.shape[1])
    events = _events(detections, is_counted)
    values = np.array([_sensitivities(events, counts, row) for row in weights])
    names = [f"sensitivity_at_{rate:g}_fp" for rate in FALSE_POSITIVES]
    return {"froc": values.mean(1), **dict(zip(names, values.T, strict=True))}


def froc(
    detections: Detections, lesions: Lesions, slides: int, min_diameter: float = MIN_DIAMETER
) -> dict[str, float]:
    """Returns the scores of `weighted_froc`, unweighted.

    Args:
        detections: of all slides.
        lesions: likewise.
        slides: their number, with those that have neither.
        min_diameter: see `weighted_froc`.
    """
    scores = weighted_froc(detections, lesions, np.ones((1, slides)), min_diameter)
    return {name: float(value[0]) for name, value in scores.items()}


def _events(detections: Detections, is_counted: Bool[np.ndarray, " lesions"]) -> _Events:
    order = np.argsort(-detections.score, kind="stable")
    slide, score, lesion = (values[order] for values in detections)
    is_event = lesion < 0
    is_event[np.unique(lesion, return_index=True)[1]] = True
    is_event &= np.append(is_counted, True)[lesion]  # -1 is the last one
    is_last_of_ties = np.diff(score[is_event], append=np.nan) != 0
    return _Events(slide[is_event], lesion[is_event] >= 0, is_last_of_ties)


def _sensitivities(events: _Events, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the sensitivity at each of `FALSE_POSITIVES`.

    Args:
        events: of all slides.
        counts: lesions of each slide.
        weights: how often each slide counts.
    """
    lesions = weights @ counts
    if not lesions:
        return np.full(len(FALSE_POSITIVES), np.nan)
    of_event = weights[events.slide]
    hits, false_positives = (
        np.append(0, np.cumsum(of_event * chosen)[events.is_last_of_ties])
        for chosen in (events.is_hit, ~events.is_hit)
    )
    # Where several points have the same false positives, `interp` takes the last.
    return np.interp(FALSE_POSITIVES, false_positives / weights.sum(), hits / lesions)
