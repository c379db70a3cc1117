"""The cells of a slide: squares of the network's labelled region, on multiples of the stride."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

# Target pixels of a block, with its margin: a quarter of this square is decoded by each of a few
# threads, and the part of it that is read twice stays small.
_BLOCK_PIXELS = 1088


class Rectangles(NamedTuple):
    """Rectangles in whole pixels of level 0, clipped to the slide: int64[n] each."""

    x: np.ndarray
    y: np.ndarray
    width: np.ndarray
    height: np.ndarray


class Grid(NamedTuple):
    """The cells of one slide.

    Attributes:
        window: height and width in target pixels of what the network reads.
        cell: of the square in its centre that the probability describes.
        stride: distance of two cells.
        full: width and height of a target pixel in pixels of level 0.
        size: width and height of the slide in pixels of level 0.
    """

    window: int
    cell: int
    stride: int
    full: tuple[float, float]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; the last ones may reach beyond the slide."""
        columns, rows = (
            # A last cell of less than half a pixel of level 0 would be empty.
            max(1, math.ceil((side - 0.5) / (self.stride * full)))
            for side, full in zip(self.size, self.full, strict=True)
        )
        return rows, columns

    @property
    def margin(self) -> int:
        """Target pixels of a window before its cell."""
        return (self.window - self.cell) // 2

    @property
    def block(self) -> int:
        """Cells in a row of a block."""
        return 1 + max(0, _BLOCK_PIXELS - self.window) // self.stride

    @property
    def block_pixels(self) -> int:
        """Height and width of a block in target pixels."""
        return (self.block - 1) * self.stride + self.window

    def rectangles(
        self, rows: Int[np.ndarray, " n"], columns: Int[np.ndarray, " n"], extent: int | None = None
    ) -> Rectangles:
        """Returns cells in pixels of level 0; neighbours share their edge.

        Args:
            rows: of the cells.
            columns: likewise.
            extent: width in target pixels; None = `cell`.
        """
        extent = self.cell if extent is None else extent
        edges = []
        for index, full, side in zip((columns, rows), self.full, self.size, strict=True):
            low = np.rint(index * self.stride * full).astype(np.int64)
            high = np.rint((index * self.stride + extent) * full).astype(np.int64)
            edges.append((np.minimum(low, side - 1), np.minimum(np.maximum(high, low + 1), side)))
        (left, right), (top, bottom) = edges
        return Rectangles(left, top, right - left, bottom - top)

    def meeting(self, mask: Bool[np.ndarray, "height width"], step: float) -> np.ndarray:
        """Returns which cells contain a part of a mask.

        Args:
            mask: of the whole slide.
            step: width of its pixels in pixels of level 0.

        Returns:
            bool[rows, columns].
        """
        sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
        sums[1:, 1:] = mask.cumsum(0).cumsum(1)
        rows, columns = self.shape

        def bounds(count: int, full: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
            start = np.arange(count) * self.stride * full / step
            first = np.minimum(np.floor(start + 1e-9).astype(int), limit - 1)
            end = np.ceil(start + self.cell * full / step - 1e-9).astype(int)
            return first, np.clip(end, first + 1, limit)

        top, bottom = bounds(rows, self.full[1], mask.shape[0])
        left, right = bounds(columns, self.full[0], mask.shape[1])
        counts = (
            sums[np.ix_(bottom, right)]
            - sums[np.ix_(top, right)]
            - sums[np.ix_(bottom, left)]
            + sums[np.ix_(top, left)]
        )
        return counts > 0
