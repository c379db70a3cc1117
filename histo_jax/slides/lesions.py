"""Lesions: what CAMELYON16's evaluation code makes of annotated areas."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from histo_jax.slides import libraries

# Micrometres: half of 75, the size of five tumour cells.
_MARGIN = 37.5


class Lesion(NamedTuple):
    """A widened part of the annotated area.

    Attributes:
        shape: shapely polygon in micrometres.
        diameter: length of the major axis of the ellipse with the same second moments, in
            micrometres.
    """

    shape: Any
    diameter: float


def find(area: Any, mpp: tuple[float, float]) -> list[Lesion]:
    """Returns the lesions of a slide.

    The area is widened by 37.5 micrometres, so that parts nearer than 75 become one, and holes are
    filled.

    Args:
        area: shapely polygons in pixels of level 0, valid.
        mpp: width and height of a pixel in micrometres.
    """
    shapely, affinity = libraries.load("shapely"), libraries.load("shapely.affinity")
    widened = affinity.scale(area, *mpp, origin=(0, 0)).buffer(_MARGIN)
    filled = [shapely.Polygon(part.exterior) for part in shapely.get_parts(widened)]
    parts = shapely.get_parts(shapely.union_all(filled))
    return [Lesion(part, _major_axis(part)) for part in parts if not part.is_empty]


def locate(
    lesions: list[Lesion], x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]
) -> Int[np.ndarray, " points"]:
    """Returns the index of the lesion in which each point is, -1 = none.

    Args:
        lesions: of a slide.
        x: in micrometres.
        y: likewise.
    """
    shapely = libraries.load("shapely")
    tree = shapely.STRtree([lesion.shape for lesion in lesions])
    points, found = tree.query(shapely.points(x, y), predicate="intersects")
    result = np.full(len(x), -1)
    result[points] = found
    return result


def _major_axis(polygon: Any) -> float:
    """Returns the major axis by Green's theorem: integrals over the polygon are sums of edges."""
    x, y = (np.asarray(polygon.exterior.coords) - polygon.centroid.coords[0]).T
    x0, x1, y0, y1 = x[:-1], x[1:], y[:-1], y[1:]
    cross = x0 * y1 - x1 * y0
    xx = (cross * (x0 * x0 + x0 * x1 + x1 * x1)).sum() / 12
    yy = (cross * (y0 * y0 + y0 * y1 + y1 * y1)).sum() / 12
    xy = (cross * (2 * x0 * y0 + x0 * y1 + x1 * y0 + 2 * x1 * y1)).sum() / 24
    moments = np.array([[xx, xy], [xy, yy]]) / (cross.sum() / 2)
    return float(4 * np.sqrt(np.linalg.eigvalsh(moments)[-1]))
