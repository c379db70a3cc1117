"""The probability of each cell: reads blocks ahead by threads, and computes their windows."""

import collections
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32
from scipy.special import expit

from histo_jax.predictor import Predictor
from histo_jax.run import signals
from histo_jax.slides.grid import Grid
from histo_jax.slides.reader import WHITE, Pixels, Slide
from histo_jax.slides.resolution import Scale
from histo_jax.slides.scaling import THREADS, read_scaled


class _Block(NamedTuple):
    """Cells that are read together.

    Attributes:
        rows: int[n], of the cells on the grid.
        columns: likewise.
    """

    rows: np.ndarray
    columns: np.ndarray


def compute(
    predictor: Predictor,
    slide: Slide,
    scale: Scale,
    grid: Grid,
    is_tissue: Bool[np.ndarray, "rows columns"],
    on_cells: Callable[[int], object],
) -> Float32[np.ndarray, "rows columns"]:
    """Returns the probability of each cell, NaN where there is no tissue.

    Host and devices hold a few blocks at a time, whatever the size of the slide.

    Args:
        predictor: the networks.
        slide: open.
        scale: how target pixels are read.
        grid: the cells.
        is_tissue: cells with tissue.
        on_cells: called with the number of cells that were computed.

    Raises:
        DataError: the slide is corrupt.
        Preempted: a signal has asked this process to stop.
    """
    result = np.full(grid.shape, np.nan, np.float32)
    blocks = list(_blocks(is_tissue, grid.block))
    if not blocks:
        return result
    rows = np.concatenate([block.rows for block in blocks])
    columns = np.concatenate([block.columns for block in blocks])
    done = 0
    windows = _read_ahead(slide, scale, grid, blocks)
    with contextlib.closing(predictor.window_logits(windows)) as outputs:
        for raw in signals.stopping(outputs):
            probabilities = expit(predictor.calibrate(raw).mean(0))
            end = done + len(probabilities)
            result[rows[done:end], columns[done:end]] = probabilities
            on_cells(end - done)
            done = end
    return result


def _blocks(is_tissue: np.ndarray, size: int) -> Iterator[_Block]:
    """Yields the cells with tissue of each square of `size` by `size` cells."""
    for top in range(0, is_tissue.shape[0], size):
        strip = is_tissue[top : top + size]
        for left in np.unique(np.flatnonzero(strip.any(0)) // size) * size:
            rows, columns = np.nonzero(strip[:, left : left + size])
            yield _Block(rows + top, columns + left)


def _read_ahead(
    slide: Slide, scale: Scale, grid: Grid, blocks: list[_Block]
) -> Iterator[tuple[Pixels, np.ndarray]]:
    """Yields the pixels of each block and the corners of its windows in them."""
    remaining = iter(blocks)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for block in remaining:
                pending.append(pool.submit(_read, slide, scale, grid, block))
                if len(pending) > THREADS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(slide: Slide, scale: Scale, grid: Grid, block: _Block) -> tuple[Pixels, np.ndarray]:
    """Reads what the windows of a block need, and pads it with white to the size of all blocks."""
    top, left = block.rows.min(), block.columns.min()
    corners = np.stack([block.rows - top, block.columns - left], axis=1) * grid.stride
    height, width = (int(side) + grid.window for side in corners.max(0))
    x, y = (int(first) * grid.stride - grid.margin for first in (left, top))
    pixels = np.full((grid.block_pixels, grid.block_pixels, 3), WHITE, np.uint8)
    pixels[:height, :width] = read_scaled(slide, scale, x, y, width, height)
    return pixels, corners
