"""Tiled 3x3 convolutions and their gradients, fast on one CPU; see `winograd_block.py`.

The gradients of XLA's own convolutions are slow on CPU. Here tiles are computed with plain matrix
products:

- `Winograd`: minimal filtering F(m x m, 3x3) (Lavin & Gray, "Fast Algorithms for Convolutional
  Neural Networks", 2016), which needs 2.25 (m = 2) or 4 (m = 4) times fewer multiplications;
- `FewChannels`: for images of a few channels, one product from 4x4 inputs to 2x2 outputs.

The outputs of the tiles are kept as separate output phases: `phases[p][q]` holds row p and column q
of every tile. Height and width must be equal, even, and divisible by the tile size m.
"""

import abc
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Image = Float[Array, "images height width channels"]
Kernel = Float[Array, "3 3 channels features"]
Matrix = Float[Array, "rows columns"]
Values = Float[Array, "..."]
# Arrays of the same shape, indexed by row and column.
Grid = list[list[Values]]

# From this height on, 4x4 tiles are faster than 2x2 tiles; below it their 36 matrix products become
# too small.
_LARGE_TILE_HEIGHT = 24


class Convolution(abc.ABC):
    """A 3x3 convolution with zero padding, and its gradients.

    Attributes:
        m: height and width of the output of a tile.
        recompute_phases: whether computing the output a second time is faster than keeping it for
            the gradient.
    """

    m: int
    recompute_phases: bool

    @abc.abstractmethod
    def transform(self, kernel: Kernel) -> Grid:
        """Returns the transformed kernel: a matrix for each matrix product."""

    @abc.abstractmethod
    def transform_gradient(self, gradient: Grid) -> Kernel:
        """Returns the gradient of the kernel, given the gradient of the transformed kernel."""

    @abc.abstractmethod
    def phases(self, x: Image, kernel: Grid) -> Grid:
        """Returns m x m output phases, float[images, height / m, width / m, features] each.

        Args:
            x: the input.
            kernel: the transformed kernel.
        """

    @abc.abstractmethod
    def gradients(self, x: Image, kernel: Grid, phases: Grid) -> tuple[Grid, Grid]:
        """Returns the gradient of the transformed kernel and the phases of the gradient of `x`.

        Args:
            x: the input.
            kernel: the transformed kernel.
            phases: phases of the gradient of the output.
        """


def choose_convolution(x: Image, infer: bool) -> Convolution:
    """Returns the fastest convolution for the height and the channels of `x`.

    Args:
        x: the input.
        infer: whether no gradient is needed.
    """
    if x.shape[-1] <= 4:
        return FewChannels()
    large = not infer and x.shape[1] >= _LARGE_TILE_HEIGHT and x.shape[1] % 4 == 0
    return Winograd(4 if large else 2)


class Winograd(Convolution):
    """F(m x m, 3x3): products of transformed tiles and transformed kernels."""

    recompute_phases = False

    def __init__(self, m: int) -> None:
        # The Toom-Cook construction from m + 1 points and infinity.
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
        """Returns (m + 2) x (m + 2) matrices [channels, features]."""
        return _transform_2d(self.kernels, [[kernel[i, j] for j in range(3)] for i in range(3)])

    def transform_gradient(self, gradient: Grid) -> Kernel:
        """See `Convolution`."""
        return jnp.stack([jnp.stack(row) for row in _transform_2d(self.kernels.T, gradient)])

    def _tiles(self, x: Image) -> Grid:
        """Returns the transformed tiles: (m + 2) x (m + 2) matrices [tiles, channels]."""
        m, count, channels = self.m, x.shape[1] // self.m, x.shape[-1]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows = [_strided_slice(x, i, m, count, 1) for i in range(m + 2)]
        grid = [[_strided_slice(row, j, m, count, 2) for j in range(m + 2)] for row in rows]
        return [[v.reshape(-1, channels) for v in row] for row in _transform_2d(self.inputs, grid)]

    def phases(self, x: Image, kernel: Grid) -> Grid:
        """See `Convolution`."""
        shape = (len(x), x.shape[1] // self.m, x.shape[1] // self.m, -1)
        products = jax.tree.map(jnp.matmul, self._tiles(x), kernel)
        return jax.tree.map(lambda v: v.reshape(shape), _transform_2d(self.outputs, products))

    def gradients(self, x: Image, kernel: Grid, phases: Grid) -> tuple[Grid, Grid]:
        """See `Convolution`."""
        count = x.shape[1] // self.m
        products = jax.tree.map(
            lambda v: v.reshape(-1, v.shape[-1]), _transform_2d(self.outputs.T, phases)
        )
        tiles = jax.tree.map(lambda v, u: v @ u.T, products, kernel)
        tiles = jax.tree.map(lambda v: v.reshape(len(x), count, count, -1), tiles)
        gradient = jax.tree.map(lambda v, p: v.T @ p, self._tiles(x), products)
        return gradient, _overlap_add_2d(_transform_2d(self.inputs.T, tiles))


class FewChannels(Convolution):
    """For about 3 channels: one product from 4x4 inputs to 2x2 outputs."""

    m = 2
    # The output is much larger than the input: recomputing it is faster than reading it.
    recompute_phases = True

    def transform(self, kernel: Kernel) -> Grid:
        """Returns one matrix [16 * channels, 4 * features]."""
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
        return [[cells.transpose(0, 2, 1, 3, 4, 5).reshape(-1, 4 * features)]]

    def transform_gradient(self, gradient: Grid) -> Kernel:
        """See `Convolution`."""
        ((matrix,),) = gradient
        channels = len(matrix) // 16
        cells = matrix.reshape(2, 2, 2, 2, channels, 4, -1).transpose(0, 2, 1, 3, 4, 5, 6)
        placed = cells.reshape(4, 4, channels, 4, -1)
        parts = [placed[p : p + 3, q : q + 3, :, 2 * p + q] for p in (0, 1) for q in (0, 1)]
        return functools.reduce(jnp.add, parts)

    def _patches(self, x: Image) -> Matrix:
        """Returns the 4x4 inputs of every tile, [tiles, 16 * channels]."""
        images, height, _, channels = x.shape
        half = height // 2
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        cells = x.reshape(images, half + 1, 2, half + 1, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        cells = cells.reshape(images, half + 1, half + 1, 4 * channels)
        four = [cells[:, i : i + half, j : j + half] for i in (0, 1) for j in (0, 1)]
        return jnp.concatenate(four, -1).reshape(-1, 16 * channels)

    def phases(self, x: Image, kernel: Grid) -> Grid:
        """See `Convolution`."""
        half = x.shape[1] // 2
        outputs = (self._patches(x) @ kernel[0][0]).reshape(len(x), half, half, 4, -1)
        return [[outputs[:, :, :, 2 * p + q] for q in (0, 1)] for p in (0, 1)]

    def gradients(self, x: Image, kernel: Grid, phases: Grid) -> tuple[Grid, Grid]:
        """See `Convolution`."""
        outputs = jnp.concatenate([phase for row in phases for phase in row], -1)
        outputs = outputs.reshape(-1, outputs.shape[-1])
        half = x.shape[1] // 2
        four = (outputs @ kernel[0][0].T).reshape(len(x), half, half, 2, 2, 2, 2, -1)
        # The 4x4 inputs of a tile are four 2x2 cells.
        tiles = [[four[..., p // 2, q // 2, p % 2, q % 2, :] for q in range(4)] for p in range(4)]
        return [[self._patches(x).T @ outputs]], _overlap_add_2d(tiles)


def interleave(phases: Grid) -> Image:
    """Returns the image that has these phases."""
    m = len(phases)
    if m == 1:
        return phases[0][0]
    images, count, _, channels = phases[0][0].shape
    rows = [jnp.stack(row, 3).reshape(images, count, -1, channels) for row in phases]
    return jnp.stack(rows, 2).reshape(images, count * m, -1, channels)


def _linear_combination(factors: np.ndarray, arrays: list[Values]) -> Values:
    """Returns the sum of the arrays times constant factors; skips factors of zero."""
    terms = [
        array if factor == 1 else -array if factor == -1 else array * array.dtype.type(factor)
        for factor, array in zip(factors, arrays, strict=True)
        if factor
    ]
    return functools.reduce(jnp.add, terms)


def _transform_2d(matrix: np.ndarray, grid: Grid) -> Grid:
    """Returns `matrix @ grid @ matrix.T`, where the entries of the grid are arrays."""
    rows = [
        [_linear_combination(line, list(column)) for column in zip(*grid, strict=True)]
        for line in matrix
    ]
    return [[_linear_combination(line, row) for line in matrix] for row in rows]


def _strided_slice(x: Image, first: int, stride: int, count: int, axis: int) -> Values:
    return lax.slice_in_dim(x, first, first + stride * (count - 1) + 1, stride, axis)


def _overlap_add(parts: list[Image], axis: int) -> list[Image]:
    """Adds the borders that neighbouring tiles share, and drops the outermost ones, the padding.

    Args:
        parts: the m + 2 rows (or columns) of all tiles.
        axis: that of the rows (or columns) in each array.

    Returns:
        The m rows (or columns) of the image's phases.
    """

    def shifted(part: Image, by: int) -> Image:
        padding = [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(part.ndim)]
        return lax.pad(part, np.zeros((), part.dtype), padding)

    inner = parts[1:-1]
    inner[0] = inner[0] + shifted(parts[-1], 1)
    inner[-1] = inner[-1] + shifted(parts[0], -1)
    return inner


def _overlap_add_2d(tiles: Grid) -> Grid:
    """Returns the phases of the image that is the sum of the overlapping tiles."""
    columns = [_overlap_add(row, 2) for row in tiles]
    rows = [_overlap_add(list(column), 1) for column in zip(*columns, strict=True)]
    return [list(row) for row in zip(*rows, strict=True)]
