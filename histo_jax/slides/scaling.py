"""Reads regions of a slide in target pixels, each the area-weighted mean of what it covers."""

import concurrent.futures
import math
import os

import numpy as np
import scipy.sparse

from histo_jax.run import signals
from histo_jax.slides.reader import Pixels, Slide
from histo_jax.slides.resolution import Scale, coarse_scale

# That read and scale, each a strip in several copies, about 50 MB.
THREADS = min(8, os.cpu_count() or 1)
# Pixels of a level that a thread reads for a thumbnail, in each direction: tiles of a file in rows
# as wide as the slide would not stay in OpenSlide's cache.
_SQUARE = 1024
# Pixels of a level that are read at once; several threads hold as many, in several copies.
_STRIP_PIXELS = 2_000_000
# Rows that are scaled at once: their sums, transposed on the way, stay in a core's cache.
_ROWS = 16
_CHANNELS = 3


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
    left, by_column = _weights(x, width, scale.factor[0])
    source_width = by_column.shape[1]
    columns = scipy.sparse.kron(by_column, scipy.sparse.eye_array(_CHANNELS), "csr")
    columns = columns.astype(np.float32)
    pixels = np.empty((height, width, _CHANNELS), np.uint8)
    rows = max(1, int(_STRIP_PIXELS / (source_width * max(1.0, scale.factor[1]))))
    for start in range(0, height, rows):
        count = min(rows, height - start)
        top, by_row = _weights(y + start, count, scale.factor[1])
        source = slide.read(scale.level, left, top, source_width, by_row.shape[1])
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
    by_row: scipy.sparse.csr_array, columns: scipy.sparse.csr_array, source: Pixels
) -> np.ndarray:
    """Returns the pixels with rows and columns scaled.

    Args:
        by_row: weights of the source's rows in target rows.
        columns: weights of the values in a row of the source, each pixel's channels in turn, in
            those of a target row.
        source: pixels of a level.
    """
    count = by_row.shape[0]
    scaled = np.empty((count, columns.shape[0]), np.uint8)
    for start in range(0, count, _ROWS):
        weights = by_row[start : start + _ROWS]
        first, end = weights.indices.min(), weights.indices.max() + 1
        part = source[first:end].reshape(end - first, -1).astype(np.float32)
        sums = columns @ (weights[:, first:end] @ part).T
        scaled[start : start + _ROWS] = (sums + 0.5).astype(np.uint8).T
    return scaled.reshape(count, -1, _CHANNELS)


def thumbnail(slide: Slide, step: float) -> Pixels:
    """Returns the whole slide; each pixel is `step` pixels of level 0 wide and high.

    Raises:
        DataError: the file is corrupt.
        Preempted: a signal has asked this process to stop.
    """
    width, height = (max(1, math.ceil(side / step)) for side in slide.size)
    scale = coarse_scale(slide, (step, step))
    columns, rows = (max(1, round(_SQUARE / factor)) for factor in scale.factor)
    image = np.empty((height, width, _CHANNELS), np.uint8)

    def read(x: int, y: int) -> None:
        ends = min(columns, width - x), min(rows, height - y)
        image[y : y + rows, x : x + columns] = read_scaled(slide, scale, x, y, *ends)

    # A slide without a pyramid is read as a whole, which takes minutes.
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        futures = [
            pool.submit(read, x, y)
            for y in range(0, height, rows)
            for x in range(0, width, columns)
        ]
        try:
            for future in signals.stopping(futures):
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return image
