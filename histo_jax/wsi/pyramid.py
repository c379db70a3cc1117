"""The map as a tiled pyramidal OME-TIFF, one pixel a cell."""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from histo_jax.slides import libraries
from histo_jax.slides.grid import Grid
from histo_jax.slides.reader import Spacing

_TILE = 256
# A level this small needs no smaller one.
_SMALLEST = 64


def write(
    path: Path,
    probabilities: Float32[np.ndarray, "rows columns"],
    grid: Grid,
    spacing: Spacing,
    name: str,
) -> None:
    """Writes the probabilities, float32, NaN where nothing was computed.

    The upper left corner of the map is that of the slide, and a pixel is one stride wide.

    Args:
        path: of the file.
        probabilities: of the cells.
        grid: the cells.
        spacing: micrometres of a pixel of level 0.
        name: of the slide.
    """
    levels = [probabilities]
    while max(levels[-1].shape) > _SMALLEST:
        levels.append(_halve(levels[-1]))
    metadata = {
        "axes": "YX",
        "Name": name,
        "PhysicalSizeX": grid.stride * grid.full[0] * spacing.x,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": grid.stride * grid.full[1] * spacing.y,
        "PhysicalSizeYUnit": "µm",
    }
    options = {"tile": (_TILE, _TILE), "compression": "zlib", "photometric": "minisblack"}
    with libraries.load("tifffile").TiffWriter(path, ome=True) as file:
        file.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **options)
        for level in levels[1:]:
            file.write(level, subfiletype=1, metadata=None, **options)


def _halve(values: np.ndarray) -> np.ndarray:
    """Returns the mean of each square of four pixels, leaving out NaN."""
    padded = np.pad(values, [(0, side % 2) for side in values.shape], constant_values=np.nan)
    squares = padded.reshape(padded.shape[0] // 2, 2, -1, 2).swapaxes(1, 2).reshape(-1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of squares that are all NaN
        means = np.nanmean(squares, axis=1, dtype=np.float64)
    return means.reshape(padded.shape[0] // 2, -1).astype(np.float32)
