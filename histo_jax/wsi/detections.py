"""Detections: the local maxima of a map."""

from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Float32

from histo_jax.slides.grid import Grid
from histo_jax.slides.reader import Spacing

# Micrometres. CAMELYON16 takes annotations that are nearer than this for one lesion.
RADIUS = 75.0


class Detections(NamedTuple):
    """Where there may be a lesion.

    Attributes:
        x: of the cell's centre, in pixels of level 0.
        y: likewise.
        probability: of the cell.
    """

    x: Float[np.ndarray, " detections"]
    y: Float[np.ndarray, " detections"]
    probability: Float32[np.ndarray, " detections"]


def find(
    probabilities: Float32[np.ndarray, "rows columns"],
    grid: Grid,
    spacing: Spacing,
    radius: float = RADIUS,
) -> Detections:
    """Returns the cells whose probability is the highest of all cells within a radius.

    Of equal ones the first counts, by rows and then by columns.

    Args:
        probabilities: NaN where there is no cell.
        grid: the cells.
        spacing: of level 0.
        radius: in micrometres, between centres of cells.
    """
    rows, columns = np.nonzero(~np.isnan(probabilities))
    order = np.argsort(-probabilities[rows, columns], kind="stable")
    ranks = np.zeros(probabilities.shape, np.int64)
    ranks[rows[order], columns[order]] = np.arange(len(order), 0, -1)
    disc = _disc(grid, spacing, radius)
    highest = scipy.ndimage.maximum_filter(ranks, footprint=disc, mode="constant")
    rows, columns = np.nonzero((ranks == highest) & (ranks > 0))
    x, y, width, height = grid.rectangles(rows, columns)
    return Detections(x + width / 2, y + height / 2, probabilities[rows, columns])


def _disc(grid: Grid, spacing: Spacing, radius: float) -> np.ndarray:
    """Returns which neighbours of a cell are within a radius."""
    axes = []
    for full, mpp in zip(grid.full, (spacing.x, spacing.y), strict=True):
        step = grid.stride * full * mpp
        reach = int(radius / step)
        axes.append(np.arange(-reach, reach + 1) * step)
    return axes[1][:, None] ** 2 + axes[0] ** 2 <= radius**2
