"""3x3 convolutions by tiles, fast on one CPU, and their gradients; see `winograd_block.py`.

XLA's own convolution gradients are slow there. Here each tile's share is a plain matrix product:

- `Winograd`: minimal filtering F(m x m, 3x3) (Lavin & Gray, "Fast Algorithms for Convolutional
  Neural Networks", 2016), which needs 2.25 (m = 2) or 4 (m = 4) times fewer multiplications;
- `FewChannels`: for the few channels of an image, all 4x4 inputs to all 2x2 outputs at once.

A tile's outputs stay apart as output phases, `phases[p][q]` = row p and column q of every tile.
Height and width must be equal and even, and divide by the tile's size m.
"""

import abc
import functools
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Image = Float[Array, "images height width channels"]
Kernel = Float[Array, "3 3 channels features"]
Matrix = Float[Array, "rows columns"]
Values = Float[Array, "..."]
# Arrays of one shape, each by its row and column in a tile.
Grid = list[list[Values]]
# What a convolution makes of its kernel: one matrix, or one for each product.
Transformed = TypeVar("Transformed", Matrix, Grid)

# From this height on, 4x4 tiles are faster than 2x2; below, their 36 products become too small.
_LARGE_TILE_HEIGHT = 24


class Convolution(abc.ABC, Generic[Transformed]):
    """A 3x3 convolution with zero padding, and the pieces of its gradient.

    Attributes:
        m: height and width of a tile's output.
        recomputes: whether making the output again is faster than keeping it for the gradient.
    """

    m: int
    recomputes: bool

    @abc.abstractmethod
    def transform(self, kernel: Kernel) -> Transformed:
        """Returns the kernel in the form that the products need."""

    @abc.abstractmethod
    def transform_gradient(self, gradient: Transformed) -> Kernel:
        """Returns the gradient of the kernel from that of its transformed form."""

    @abc.abstractmethod
    def phases(self, x: Image, kernel: Transformed) -> Grid:
        """Returns the output's phases, float[images, height / m, width / m, features] each."""

    @abc.abstractmethod
    def gradients(self, x: Image, kernel: Transformed, phases: Grid) -> tuple[Transformed, Grid]:
        """Returns the gradient of the transformed kernel, and the phases of that of `x`.

        Args:
            x: the input.
            kernel: transformed.
            phases: those of the output's gradient.
        """


def choose(x: Image, infer: bool) -> Convolution[Any]:
    """Returns the fastest convolution for the input's height and channels."""
    if x.shape[-1] <= 4:
        return FewChannels()
    large = not infer and x.shape[1] >= _LARGE_TILE_HEIGHT and x.shape[1] % 4 == 0
    return Winograd(4 if large else 2)


class Winograd(Convolution[Grid]):
    """F(m x m, 3x3): products of transformed tiles and transformed kernels."""

    recomputes = False

    def __init__(self, m: int) -> None:
        # Toom and Cook's construction from m + 1 points and infinity.
        self.m = m
        points = np.array((0, 1, -1, 2, -2)[: m + 1], float)
        self.outputs = np.zeros((m, m + 2))
        self.kernels = np.zeros((m + 2, 3))
        self.inputs = np.zeros((m + 2, m + 2))
        for i, point in enumerate(points):
            others = np.delete(points, i)
            self.outputs[:, i] = point ** np.arange(m)
            self.kernels[i] = point ** np.arange(3) / np.prod(point - others)
            self.inputs[i, :-1] = np.poly(others)[::-1]
        self.outputs[-1, -1] = self.kernels[-1, -1] = 1
        self.inputs[-1] = np.poly(points)[::-1]

    def transform(self, kernel: Kernel) -> Grid:
        """Returns (m + 2)^2 matrices [channels, features]."""
        return _both_ways(self.kernels, [[kernel[i, j] for j in range(3)] for i in range(3)])

    def transform_gradient(self, gradient: Grid) -> Kernel:
        """See `Convolution`."""
        return jnp.stack([jnp.stack(row) for row in _both_ways(self.kernels.T, gradient)])

    def _tiles(self, x: Image) -> Grid:
        """Returns the transformed tiles: (m + 2)^2 matrices [tiles of all images, channels]."""
        m, count, channels = self.m, x.shape[1] // self.m, x.shape[-1]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows = [_strided(x, i, m, count, 1) for i in range(m + 2)]
        grid = [[_strided(row, j, m, count, 2) for j in range(m + 2)] for row in rows]
        return [[v.reshape(-1, channels) for v in row] for row in _both_ways(self.inputs, grid)]

    def phases(self, x: Image, kernel: Grid) -> Grid:
        """See `Convolution`."""
        shape = (len(x), x.shape[1] // self.m, x.shape[1] // self.m, -1)
        products = jax.tree.map(jnp.matmul, self._tiles(x), kernel)
        return jax.tree.map(lambda v: v.reshape(shape), _both_ways(self.outputs, products))

    def gradients(self, x: Image, kernel: Grid, phases: Grid) -> tuple[Grid, Grid]:
        """See `Convolution`."""
        count = x.shape[1] // self.m
        products = jax.tree.map(
            lambda v: v.reshape(-1, v.shape[-1]), _both_ways(self.outputs.T, phases)
        )
        tiles = jax.tree.map(lambda v, u: v @ u.T, products, kernel)
        tiles = jax.tree.map(lambda v: v.reshape(len(x), count, count, -1), tiles)
        gradient = jax.tree.map(lambda v, p: v.T @ p, self._tiles(x), products)
        return gradient, _overlap_both_ways(_both_ways(self.inputs.T, tiles))


class FewChannels(Convolution[Matrix]):
    """For 3 channels or so: one product from 4x4 inputs to 2x2 outputs."""

    m = 2
    # The output is far larger than the input: making it again is faster than reading it again.
    recomputes = True

    def transform(self, kernel: Kernel) -> Matrix:
        """Returns the matrix [16 * channels, 4 * features]."""
        _, _, channels, features = kernel.shape
        placed = [
            jnp.pad(
                kernel[:, :, :, None],
                ((p, 1 - p), (q, 1 - q), (0, 0), (2 * p + q, 3 - 2 * p - q), (0, 0)),
            )
            for p in (0, 1)
            for q in (0, 1)
        ]
        cells = functools.reduce(jnp.add, placed).reshape(2, 2, 2, 2, channels, 4 * features)
        return cells.transpose(0, 2, 1, 3, 4, 5).reshape(-1, 4 * features)

    def transform_gradient(self, gradient: Matrix) -> Kernel:
        """See `Convolution`."""
        channels = len(gradient) // 16
        cells = gradient.reshape(2, 2, 2, 2, channels, 4, -1).transpose(0, 2, 1, 3, 4, 5, 6)
        placed = cells.reshape(4, 4, channels, 4, -1)
        parts = [placed[p : p + 3, q : q + 3, :, 2 * p + q] for p in (0, 1) for q in (0, 1)]
        return functools.reduce(jnp.add, parts)

    def _patches(self, x: Image) -> Matrix:
        """Returns the 4x4 inputs of every tile, [tiles of all images, 16 * channels]."""
        images, height, _, channels = x.shape
        half = height // 2
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        cells = x.reshape(images, half + 1, 2, half + 1, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        cells = cells.reshape(images, half + 1, half + 1, 4 * channels)
        four = [cells[:, i : i + half, j : j + half] for i in (0, 1) for j in (0, 1)]
        return jnp.concatenate(four, -1).reshape(-1, 16 * channels)

    def phases(self, x: Image, kernel: Matrix) -> Grid:
        """See `Convolution`."""
        half = x.shape[1] // 2
        outputs = (self._patches(x) @ kernel).reshape(len(x), half, half, 4, -1)
        return [[outputs[:, :, :, 2 * p + q] for q in (0, 1)] for p in (0, 1)]

    def gradients(self, x: Image, kernel: Matrix, phases: Grid) -> tuple[Matrix, Grid]:
        """See `Convolution`."""
        outputs = jnp.concatenate([phase for row in phases for phase in row], -1)
        outputs = outputs.reshape(-1, outputs.shape[-1])
        half = x.shape[1] // 2
        four = (outputs @ kernel.T).reshape(len(x), half, half, 2, 2, 2, 2, -1)
        # Cells (i, j) of two rows and two columns each make up the 4x4 inputs.
        tiles = [[four[..., p // 2, q // 2, p % 2, q % 2, :] for q in range(4)] for p in range(4)]
        return self._patches(x).T @ outputs, _overlap_both_ways(tiles)


def interleave(phases: Grid) -> Image:
    """Returns the image whose tiles consist of the phases."""
    m = len(phases)
    if m == 1:
        return phases[0][0]
    images, count, _, channels = phases[0][0].shape
    rows = [jnp.stack(row, 3).reshape(images, count, -1, channels) for row in phases]
    return jnp.stack(rows, 2).reshape(images, count * m, -1, channels)


def _combine(factors: np.ndarray, arrays: list[Values]) -> Values:
    """Returns the sum of arrays by constant factors, without the terms that are zero."""
    terms = [
        array if factor == 1 else -array if factor == -1 else array * array.dtype.type(factor)
        for factor, array in zip(factors, arrays, strict=True)
        if factor
    ]
    return functools.reduce(jnp.add, terms)


def _both_ways(matrix: np.ndarray, grid: Grid) -> Grid:
    """Returns `matrix @ grid @ matrix.T` where the grid's entries are arrays."""
    rows = [[_combine(line, list(column)) for column in zip(*grid, strict=True)] for line in matrix]
    return [[_combine(line, row) for line in matrix] for row in rows]


def _strided(x: Image, first: int, stride: int, count: int, axis: int) -> Values:
    return lax.slice_in_dim(x, first, first + stride * (count - 1) + 1, stride, axis)


def _overlap(parts: list[Image], axis: int) -> list[Image]:
    """Adds the borders that neighbouring tiles share; the outermost are padding and fall away."""

    def shifted(part: Image, by: int) -> Image:
        padding = [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(part.ndim)]
        return lax.pad(part, np.zeros((), part.dtype), padding)

    inner = parts[1:-1]
    inner[0] = inner[0] + shifted(parts[-1], 1)
    inner[-1] = inner[-1] + shifted(parts[0], -1)
    return inner


def _overlap_both_ways(tiles: Grid) -> Grid:
    """Returns the phases of the image that overlapping tiles add up to."""
    columns = [_overlap(row, 2) for row in tiles]
    rows = [_overlap(list(column), 1) for column in zip(*columns, strict=True)]
    return [list(row) for row in zip(*rows, strict=True)]
