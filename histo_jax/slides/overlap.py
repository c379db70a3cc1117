"""Which part of each cell of a grid an area covers."""

from typing import Any

import numpy as np

from histo_jax.slides import libraries

# A cell that lacks less than this part is covered: sums of coordinates are not exact.
_EPSILON = 1e-9


def overlaps(area: Any, shape: tuple[int, int], cell: tuple[float, float]) -> np.ndarray:
    """Returns the covered fraction of each cell; neighbours share an edge.

    The area is halved until a part is one cell, all of its cells, or empty: long outlines are cut
    once a level, not once a cell.

    Args:
        area: shapely polygons, valid.
        shape: rows and columns.
        cell: width and height of a cell in the area's unit; the first begins at 0, 0.

    Returns:
        float64[rows, columns], 0 to 1.
    """
    shapely = libraries.load("shapely")
    covered = np.zeros(shape)

    def visit(part: Any, top: int, left: int, bottom: int, right: int) -> None:
        box = shapely.box(left * cell[0], top * cell[1], right * cell[0], bottom * cell[1])
        part = part.intersection(box)
        fraction = part.area / box.area
        if fraction >= 1 - _EPSILON or bottom - top == right - left == 1:
            covered[top:bottom, left:right] = min(fraction, 1)
        elif fraction > 0 and bottom - top > right - left:
            middle = (top + bottom) // 2
            visit(part, top, left, middle, right)
            visit(part, middle, left, bottom, right)
        elif fraction > 0:
            middle = (left + right) // 2
            visit(part, top, left, bottom, middle)
            visit(part, top, middle, bottom, right)

    visit(area, 0, 0, *shape)
    return covered
