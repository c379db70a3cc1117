"""Detections of a map: local maxima by distance in micrometres, ties, and cells without tissue."""

import numpy as np
import pytest

from histo_jax.slides.grid import Grid
from histo_jax.slides.reader import Spacing
from histo_jax.wsi import detections


def make_grid(rows, columns, full=(2.0, 2.0), stride=32):
    return Grid(96, 32, stride, full, (round(columns * stride * full[0]) - 10,
                                       round(rows * stride * full[1])))  # fmt: skip


def direct(values, grid, spacing, radius):
    """Compares each cell with all others."""
    rows, columns = np.indices(values.shape)
    x = columns * grid.stride * grid.full[0] * spacing.x
    y = rows * grid.stride * grid.full[1] * spacing.y
    found = []
    for index in np.ndindex(values.shape):
        near = np.hypot(x - x[index], y - y[index]) <= radius
        before = np.arange(values.size).reshape(values.shape) < np.ravel_multi_index(
            index, values.shape
        )
        beaten = near & ((values > values[index]) | ((values == values[index]) & before))
        if not np.isnan(values[index]) and not beaten.any():
            found.append(index)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_direct_search(seed):
    """With ties, without tissue in places, and with cells that are not squares."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 12, 2)
    values = rng.random(shape).round(1).astype(np.float32)
    values[rng.random(shape) < 0.2] = np.nan
    spacing, radius = Spacing(0.25, 0.5, ""), float(rng.uniform(0, 120))
    grid = make_grid(*shape, full=(4.0, 2.5), stride=32)
    found = detections.find(values, grid, spacing, radius)
    expected = direct(values, grid, spacing, radius)
    assert [int(x // 128) for x in found.x] == [column for _, column in expected]
    assert [int(y // 80) for y in found.y] == [row for row, _ in expected]
    assert list(found.probability) == [values[index] for index in expected]


def test_centres_are_in_pixels_of_level_0():
    """Cells of 62.2 micrometres: the two maxima are 3 cells apart; the last cell is clipped."""
    values = np.full((4, 6), 0.1, np.float32)
    values[1, 2], values[1, 3], values[1, 5] = 0.9, 0.8, 0.7  # the second is next to the first
    found = detections.find(values, make_grid(4, 6), Spacing(0.972, 0.972, ""))
    assert [each for each in zip(*found, strict=True) if each[2] > 0.5] == [
        (2 * 64 + 32, 64 + 32, np.float32(0.9)), (5 * 64 + 27, 64 + 32, np.float32(0.7))
    ]  # fmt: skip
    empty = np.full((2, 2), np.nan, np.float32)
    assert detections.find(empty, make_grid(2, 2), Spacing(1.0, 1.0, "")).x.size == 0
