"""Reads regions of a slide in target pixels, each the area-weighted mean of what it covers."""

import math

import numpy as np
import scipy.sparse

from histo_jax.wsi.reader import Pixels, Slide
from histo_jax.wsi.resolution import Scale, coarse_scale

# Pixels of a level that are read at once; several threads hold as many, in several copies.
_STRIP_PIXELS = 2_000_000


def read_scaled(slide: Slide, scale: Scale, x: int, y: int, width: int, height: int) -> Pixels:
    """Returns a region in target pixels; outside of the slide it is white.

    A pixel depends on its position alone, not on the region that it is read with.

    Args:
        slide: open.
        scale: of the target pixels.
        x: left edge in target pixels; may be negative.
        y: upper edge, likewise.
        width: in target pixels.
        height: likewise.

    Raises:
        DataError: the file is corrupt there.
    """
    if scale.factor == (1.0, 1.0):
        return slide.read(scale.level, x, y, width, height)
    left, columns = _weights(x, width, scale.factor[0])
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, int(_STRIP_PIXELS / (columns.shape[1] * max(1.0, scale.factor[1]))))
    for start in range(0, height, rows):
        count = min(rows, height - start)
        top, by_row = _weights(y + start, count, scale.factor[1])
        source = slide.read(scale.level, left, top, columns.shape[1], by_row.shape[1])
        pixels[start : start + count] = _apply(by_row, columns, source)
    return pixels


def _weights(start: int, count: int, factor: float) -> tuple[int, scipy.sparse.csr_array]:
    """Returns the first source pixel, and the weights of source pixels in target pixels.

    Args:
        start: first target pixel.
        count: number of target pixels.
        factor: source pixels in a target pixel. Below 1 the weights are those of linear
            interpolation.

    Returns:
        The position of the first source pixel, and float32[count, source pixels].
    """
    index = np.arange(start, start + count)
    if factor < 1:
        centre = (index + 0.5) * factor - 0.5
        begin = np.floor(centre)
        offsets = np.arange(2)
        covered = np.stack([1 - (centre - begin), centre - begin], axis=1)
    else:
        edges = np.arange(start, start + count + 1) * factor
        low, high = edges[:-1], edges[1:]
        begin = np.floor(low)
        offsets = np.arange(math.ceil(factor) + 1)
        first = begin[:, None] + offsets
        covered = np.minimum(first + 1, high[:, None]) - np.maximum(first, low[:, None])
        covered = np.maximum(covered, 0) / factor
    origin = int(begin[0])
    positions = (begin[:, None] + offsets).astype(np.int64) - origin
    length = int(positions[covered > 0].max()) + 1
    is_used = covered > 0
    rows = np.broadcast_to(np.arange(count)[:, None], positions.shape)[is_used]
    entries = covered[is_used].astype(np.float32), (rows, positions[is_used])
    return origin, scipy.sparse.csr_array(entries, shape=(count, length), dtype=np.float32)


def _apply(
    by_row: scipy.sparse.csr_array, by_column: scipy.sparse.csr_array, source: Pixels
) -> np.ndarray:
    """Returns the pixels with rows and columns scaled."""
    height, width, channels = source.shape
    tall = by_row @ source.reshape(height, width * channels).astype(np.float32)
    count = tall.shape[0]
    turned = tall.reshape(count, width, channels).transpose(1, 0, 2).reshape(width, -1)
    scaled = by_column @ turned
    rounded = (scaled + 0.5).astype(np.uint8)
    return rounded.reshape(-1, count, channels).transpose(1, 0, 2)


def thumbnail(slide: Slide, step: float) -> Pixels:
    """Returns the whole slide; each pixel is `step` pixels of level 0 wide and high.

    Raises:
        DataError: the file is corrupt.
    """
    width, height = (max(1, math.ceil(side / step)) for side in slide.size)
    return read_scaled(slide, coarse_scale(slide, (step, step)), 0, 0, width, height)
