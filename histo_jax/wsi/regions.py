"""Regions: connected cells at or above the threshold."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float32

from histo_jax.slides import libraries
from histo_jax.slides.grid import Grid
from histo_jax.slides.reader import Spacing


class Region(NamedTuple):
    """Cells that share edges.

    Attributes:
        shape: shapely polygon in pixels of level 0.
        cells: their number.
        area: in square millimetres.
        mean: probability of its cells.
        highest: likewise.
    """

    shape: Any
    cells: int
    area: float
    mean: float
    highest: float


def find(
    probabilities: Float32[np.ndarray, "rows columns"],
    threshold: float,
    grid: Grid,
    spacing: Spacing,
) -> list[Region]:
    """Returns the regions, the largest first.

    With a stride above the cell, each cell stands for the square of one stride.
    """
    labels, count = scipy.ndimage.label(probabilities >= np.float32(threshold))
    regions = []
    for number, box in enumerate(scipy.ndimage.find_objects(labels, count), start=1):
        is_inside = labels[box] == number
        values = probabilities[box][is_inside]
        shape = _outline(is_inside, box[0].start, box[1].start, grid)
        area = shape.area * spacing.x * spacing.y / 1e6
        mean, highest = float(values.mean(dtype=np.float64)), float(values.max())
        regions.append(Region(shape, len(values), area, mean, highest))
    return sorted(regions, key=lambda region: -region.area)


def _outline(is_inside: np.ndarray, top: int, left: int, grid: Grid) -> Any:
    """Returns the union of the cells: of the runs of each row, which are fewer."""
    shapely = libraries.load("shapely")
    rows, first, last = (np.array(part) for part in zip(*_runs(is_inside), strict=True))
    begin = grid.rectangles(rows + top, first + left, grid.stride)
    end = grid.rectangles(rows + top, last + left, grid.stride)
    boxes = shapely.box(begin.x, begin.y, end.x + end.width, end.y + end.height)
    return shapely.union_all(boxes)


def _runs(is_inside: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yields row, first and last column of each run of cells."""
    for row, line in enumerate(is_inside):
        changes = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        for start, stop in zip(changes[::2], changes[1::2], strict=True):
            yield row, int(start), int(stop) - 1
