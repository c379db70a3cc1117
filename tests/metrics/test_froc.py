"""FROC: figures worked by hand, and a direct implementation of CAMELYON16's definition."""

import numpy as np
import pytest

from histo_jax.metrics import bootstrap, froc, intervals
from histo_jax.metrics.froc import FALSE_POSITIVES, Detections, Lesions


def detections(rows):
    slide, score, lesion = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(np.array(slide, int), np.array(score, float), np.array(lesion, int))


# Three lesions that count, on slides 0 and 1, and isolated tumour cells; slides 2 and 3 are normal.
LESIONS = Lesions(np.array([0, 1, 1, 1]), np.array([900.0, 275.0, 300.0, 274.9]))
ROWS = [(0, 0.9, 0), (0, 0.8, 0), (0, 0.7, -1), (1, 0.95, 3), (1, 0.6, 1), (1, 0.5, -1),
        (2, 0.65, -1), (2, 0.4, -1)]  # fmt: skip


def test_figures_worked_by_hand():
    """The curve's points: (0, 1/3), (1/4, 1/3), (2/4, 1/3), (2/4, 2/3), (3/4, 2/3), (1, 2/3)."""
    scores = froc.froc(detections(ROWS), LESIONS, 4)
    assert scores == pytest.approx(
        {"froc": (1 + 5 * 2) / 18, "sensitivity_at_0.25_fp": 1 / 3}
        | {f"sensitivity_at_{rate}_fp": 2 / 3 for rate in ("0.5", "1", "2", "4", "8")}
    )
    # With the isolated cells, the first point is (0, 1/4), the second (0, 2/4).
    scores = froc.froc(detections(ROWS), LESIONS, 4, min_diameter=0)
    assert scores["sensitivity_at_0.25_fp"] == pytest.approx(2 / 4)
    # On three slides: 1/4 lies between the points (0, 1/3) and, of tied scores, (1/3, 2/3).
    rows = [(0, 0.9, 0), (1, 0.6, 1), (2, 0.6, -1)]
    scores = froc.froc(detections(rows), LESIONS, 3)
    assert scores["sensitivity_at_0.25_fp"] == pytest.approx(1 / 3 + 3 / 4 * 1 / 3)


def test_slides_count_by_their_weights():
    """Slide 0 twice, slide 2 never: (0, 2/4), (2/4, 2/4), (2/4, 3/4), (3/4, 3/4)."""
    weights = np.array([[2.0, 1.0, 0.0, 1.0]])
    scores = froc.weighted_froc(detections(ROWS), LESIONS, weights)
    assert scores["sensitivity_at_0.25_fp"] == pytest.approx([2 / 4])
    assert scores["froc"] == pytest.approx([(2 + 5 * 3) / 24])


def test_without_detections_or_lesions():
    none = Lesions(np.array([], int), np.array([]))
    assert set(froc.froc(detections([]), LESIONS, 4).values()) == {0.0}
    assert np.isnan(list(froc.froc(detections([(0, 0.5, -1)]), none, 4).values())).all()


def direct(found, lesions, slides):
    """Goes through all thresholds, as the definition reads."""
    counted = [number for number, size in enumerate(lesions.diameter) if size >= 275]
    rates, sensitivities = [0.0], [0.0]
    for threshold in sorted(set(found.score), reverse=True):
        hits, alarms = set(), 0
        for _, score, lesion in zip(*found, strict=True):
            if score >= threshold:
                alarms += lesion == -1
                hits |= {lesion} & set(counted)
        rates.append(alarms / slides)
        sensitivities.append(len(hits) / len(counted))
    values = []
    for rate in FALSE_POSITIVES:
        before = max(i for i, value in enumerate(rates) if value <= rate)
        if before + 1 == len(rates):
            values.append(sensitivities[-1])
        else:
            part = (rate - rates[before]) / (rates[before + 1] - rates[before])
            step = sensitivities[before + 1] - sensitivities[before]
            values.append(sensitivities[before] + part * step)
    return [np.mean(values), *values]


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_direct_implementation(seed):
    rng = np.random.default_rng(seed)
    slides, count = int(rng.integers(1, 6)), int(rng.integers(1, 6))
    lesions = Lesions(rng.integers(0, slides, count), rng.uniform(200, 500, count))
    lesions.diameter[0] = 500
    number = int(rng.integers(0, 60))
    lesion = rng.integers(-count, count, number).clip(-1)
    # Scores with few digits are often tied.
    found = Detections(np.where(lesion < 0, rng.integers(0, slides, number), lesions.slide[lesion]),
                       rng.random(number).round(int(rng.integers(1, 4))), lesion)  # fmt: skip
    scores = froc.froc(found, lesions, slides)
    np.testing.assert_allclose(list(scores.values()), direct(found, lesions, slides))


def test_intervals_are_over_slides(monkeypatch):
    """The lesion of one slide is found, that of the other is missed."""
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    lesions = Lesions(np.array([0, 1]), np.array([300.0, 300.0]))
    found = detections([(0, 0.9, 0)])
    limits = bootstrap(lambda weights: froc.weighted_froc(found, lesions, weights), None, 2)
    assert limits["froc"] == [0, 1]
    limits = bootstrap(lambda weights: froc.weighted_froc(found, lesions, weights), np.zeros(2), 2)
    assert np.isnan(limits["froc"]).all()
