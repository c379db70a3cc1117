"""The block of `cnn.py` in the form that is fast on one CPU; the same numbers up to rounding.

XLA's own convolution gradients are slow there, and every array that does not fit the cache costs
more than the arithmetic. So

- convolutions are cut into tiles, and each tile's share is a plain matrix product: Winograd's
  minimal filtering F(m x m, 3x3) (Lavin & Gray, "Fast Algorithms for Convolutional Neural
  Networks", 2016), which needs 2.25 (m = 2) or 4 (m = 4) times fewer multiplications; for the few
  channels of an image, all 4x4 inputs to all 2x2 outputs at once;
- a tile's outputs stay apart, `pieces[p][q]` = row p and column q of every tile, so that the 2x2
  maximum compares whole arrays and nothing is interleaved but the small result;
- images are worked on a few at a time;
- the gradient of BatchNorm, maximum and ReLU is written out: its sums need only the maxima.

Height and width must be equal and even.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from histo_jax.models import norm as norms

# Values before pooling that are worked on at once, 10 MB in float32: measured best among 2 to 75 MB
# with 1 MiB of second-level cache a core.
_AT_ONCE = 2_500_000
# From this height on, 4x4 tiles are faster than 2x2; below, their 36 products become too small.
_LARGE = 24

Grid = list[list[Any]]


def _combine(factors: np.ndarray, arrays: list[Any]) -> Any:
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


def _strided(x: Any, first: int, stride: int, count: int, axis: int) -> Any:
    return lax.slice_in_dim(x, first, first + stride * (count - 1) + 1, stride, axis)


def _overlap(parts: list[Any], axis: int) -> list[Any]:
    """Adds the borders that neighbouring tiles share; the outermost are padding and fall away."""

    def shifted(part: Any, by: int) -> Any:
        padding = [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(part.ndim)]
        return lax.pad(part, np.zeros((), part.dtype), padding)

    inner = parts[1:-1]
    inner[0] = inner[0] + shifted(parts[-1], 1)
    inner[-1] = inner[-1] + shifted(parts[0], -1)
    return inner


def _overlap_both_ways(tiles: Grid) -> Grid:
    """Returns the pieces of the image that overlapping tiles add up to."""
    columns = [_overlap(row, 2) for row in tiles]
    rows = [_overlap(list(column), 1) for column in zip(*columns, strict=True)]
    return [list(row) for row in zip(*rows, strict=True)]


class _Winograd:
    """A convolution by F(m x m, 3x3): products of transformed tiles and transformed kernels."""

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

    def transform(self, kernel: Any) -> Grid:
        return _both_ways(self.kernels, [[kernel[i, j] for j in range(3)] for i in range(3)])

    def transform_gradient(self, gradient: Grid) -> Any:
        return jnp.stack([jnp.stack(row) for row in _both_ways(self.kernels.T, gradient)])

    def _tiles(self, x: Any) -> Grid:
        m, count, channels = self.m, x.shape[1] // self.m, x.shape[-1]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows = [_strided(x, i, m, count, 1) for i in range(m + 2)]
        grid = [[_strided(row, j, m, count, 2) for j in range(m + 2)] for row in rows]
        return [[v.reshape(-1, channels) for v in row] for row in _both_ways(self.inputs, grid)]

    def pieces(self, x: Any, kernels: Grid) -> Grid:
        shape = (len(x), x.shape[1] // self.m, x.shape[1] // self.m, -1)
        products = jax.tree.map(jnp.matmul, self._tiles(x), kernels)
        return jax.tree.map(lambda v: v.reshape(shape), _both_ways(self.outputs, products))

    def gradients(self, x: Any, kernels: Grid, pieces: Grid) -> tuple[Grid, Grid]:
        """Returns those of the transformed kernels, and the pieces of that of `x`."""
        count = x.shape[1] // self.m
        products = jax.tree.map(
            lambda v: v.reshape(-1, v.shape[-1]), _both_ways(self.outputs.T, pieces)
        )
        tiles = jax.tree.map(lambda v, u: v @ u.T, products, kernels)
        tiles = jax.tree.map(lambda v: v.reshape(len(x), count, count, -1), tiles)
        gradient = jax.tree.map(lambda v, p: v.T @ p, self._tiles(x), products)
        return gradient, _overlap_both_ways(_both_ways(self.inputs.T, tiles))


class _FewChannels:
    """A convolution of 3 channels or so: one product from 4x4 inputs to 2x2 outputs."""

    m = 2
    # The output is far larger than the input: making it again is faster than reading it again.
    recomputes = True

    def transform(self, kernel: Any) -> Any:
        _, _, channels, features = kernel.shape
        spread = [
            jnp.pad(
                kernel[:, :, :, None],
                ((p, 1 - p), (q, 1 - q), (0, 0), (2 * p + q, 3 - 2 * p - q), (0, 0)),
            )
            for p in (0, 1)
            for q in (0, 1)
        ]
        cells = functools.reduce(jnp.add, spread).reshape(2, 2, 2, 2, channels, 4 * features)
        return cells.transpose(0, 2, 1, 3, 4, 5).reshape(-1, 4 * features)

    def transform_gradient(self, gradient: Any) -> Any:
        channels = len(gradient) // 16
        cells = gradient.reshape(2, 2, 2, 2, channels, 4, -1).transpose(0, 2, 1, 3, 4, 5, 6)
        spread = cells.reshape(4, 4, channels, 4, -1)
        return sum(spread[p : p + 3, q : q + 3, :, 2 * p + q] for p in (0, 1) for q in (0, 1))

    def _patches(self, x: Any) -> Any:
        images, height, _, channels = x.shape
        half = height // 2
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        cells = x.reshape(images, half + 1, 2, half + 1, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        cells = cells.reshape(images, half + 1, half + 1, 4 * channels)
        four = [cells[:, i : i + half, j : j + half] for i in (0, 1) for j in (0, 1)]
        return jnp.concatenate(four, -1).reshape(-1, 16 * channels)

    def pieces(self, x: Any, kernel: Any) -> Grid:
        half = x.shape[1] // 2
        outputs = (self._patches(x) @ kernel).reshape(len(x), half, half, 4, -1)
        return [[outputs[:, :, :, 2 * p + q] for q in (0, 1)] for p in (0, 1)]

    def gradients(self, x: Any, kernel: Any, pieces: Grid) -> tuple[Any, Grid]:
        outputs = jnp.concatenate([piece for row in pieces for piece in row], -1)
        outputs = outputs.reshape(-1, outputs.shape[-1])
        half = x.shape[1] // 2
        four = (outputs @ kernel.T).reshape(len(x), half, half, 2, 2, 2, 2, -1)
        # Cells (i, j) of two rows and two columns each make up the 4x4 inputs.
        tiles = [[four[..., p // 2, q // 2, p % 2, q % 2, :] for q in range(4)] for p in range(4)]
        return self._patches(x).T @ outputs, _overlap_both_ways(tiles)


def _convolution(x: Any, infer: bool) -> _Winograd | _FewChannels:
    if x.shape[-1] <= 4:
        return _FewChannels()
    large = not infer and x.shape[1] >= _LARGE and x.shape[1] % 4 == 0
    return _Winograd(4 if large else 2)


def _split(x: Any, features: int) -> Any:
    """Returns the images in equal parts, [parts, images of a part, ...]."""
    parts = -(-x.shape[1] * x.shape[2] * features * len(x) // _AT_ONCE)
    parts = next(k for k in range(min(parts, len(x)), len(x) + 1) if len(x) % k == 0)
    return x.reshape(parts, len(x) // parts, *x.shape[1:])


def _join(x: Any) -> Any:
    return x.reshape(-1, *x.shape[2:])


def _windows(pieces: Grid) -> Grid:
    """Returns a grid of four pieces each, those of one 2x2 window."""
    half = range(len(pieces) // 2)
    return [
        [[pieces[2 * i + p][2 * j + q] for p in (0, 1) for q in (0, 1)] for j in half] for i in half
    ]


def _from_windows(windows: Grid) -> Grid:
    side = range(2 * len(windows))
    return [[windows[p // 2][q // 2][2 * (p % 2) + q % 2] for q in side] for p in side]


def _interleave(pieces: Grid) -> Any:
    """Returns the image [images, height, width, channels] that the pieces are cut from."""
    m = len(pieces)
    if m == 1:
        return pieces[0][0]
    images, count, _, channels = pieces[0][0].shape
    rows = [jnp.stack(row, 3).reshape(images, count, -1, channels) for row in pieces]
    return jnp.stack(rows, 2).reshape(images, count * m, -1, channels)


def infer_block(
    x: Float[Array, "images height height channels"],
    kernel: Float[Array, "3 3 channels features"],
    gain: Float[Array, " features"],
    shift: Float[Array, " features"],
) -> Float[Array, "images half half features"]:
    """Returns the ReLU of the 2x2 maxima of `convolution * gain + shift`."""
    convolution = _convolution(x, infer=True)
    kernels = convolution.transform(kernel * gain)

    def part(x: Any) -> Grid:
        windows = _windows(convolution.pieces(x, kernels))
        return [
            [jax.nn.relu(functools.reduce(jnp.maximum, window) + shift) for window in row]
            for row in windows
        ]

    return _interleave(jax.tree.map(_join, lax.map(part, _split(x, kernel.shape[-1]))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def train_block(
    x: Float[Array, "images height height channels"],
    kernel: Float[Array, "3 3 channels features"],
    scale: Float[Array, " features"],
    bias: Float[Array, " features"],
    copies: int,
) -> tuple[
    Float[Array, "images half half features"],
    Float[Array, " features"],
    Float[Array, " features"],
]:
    """Returns the block's output with the batch's own statistics, and these: mean and variance.

    `copies` runs of features share their statistics.
    The gradient goes through the output alone, and of equal maxima to the first.
    """
    return _train_block(x, kernel, scale, bias, copies)[0]


def _train_block(x: Any, kernel: Any, scale: Any, bias: Any, copies: int) -> Any:
    convolution = _convolution(x, infer=False)
    kernels = convolution.transform(kernel)
    parts = _split(x, kernel.shape[-1])

    def convolve(x: Any) -> Any:
        pieces = convolution.pieces(x, kernels)
        leaves = jax.tree.leaves(pieces)
        sums = sum(v.sum((0, 1, 2)) for v in leaves)
        squares = sum((v * v).sum((0, 1, 2)) for v in leaves)
        return (None if convolution.recomputes else pieces), sums, squares

    pieces, sums, squares = lax.map(convolve, parts)
    norm = norms.measure(sums.sum(0), squares.sum(0), math.prod(x.shape[:3]), scale, bias, copies)

    def select_all(pieces: Grid) -> Grid:
        return [[norms.select(window, scale) for window in row] for row in _windows(pieces)]

    if convolution.recomputes:
        selected = lax.map(lambda x: select_all(convolution.pieces(x, kernels)), parts)
    else:
        selected = select_all(pieces)
    output = _interleave(
        [
            [jax.nn.relu(_join(chosen) * norm.gain + norm.shift) for chosen, _ in row]
            for row in selected
        ]
    )
    return (output, norm.mean, norm.variance), (x, kernels, pieces, selected, norm)


def _train_block_gradient(copies: int, saved: Any, gradients: Any) -> Any:
    x, kernels, pieces, selected, norm = saved
    gradient = gradients[0]
    convolution = _convolution(x, infer=False)
    parts = _split(x, len(norm.gain))
    side, half = len(selected), gradient.shape[1] // len(selected)
    cut = gradient.reshape(*parts.shape[:2], half, side, half, side, -1)
    cut = [
        [
            jnp.where(chosen * norm.gain + norm.shift > 0, cut[:, :, :, i, :, j], 0)
            for j, (chosen, _) in enumerate(row)
        ]
        for i, row in enumerate(selected)
    ]
    axes = (0, 1, 2, 3)
    total = sum(v.sum(axes) for row in cut for v in row)
    weighted = sum(
        (v * (chosen - norm.mean)).sum(axes)
        for values, row in zip(cut, selected, strict=True)
        for v, (chosen, _) in zip(values, row, strict=True)
    )
    terms = norms.gradient(norm, total, weighted, math.prod(x.shape[:3]), copies)

    def part(total: Any, part: Any) -> Any:
        x, pieces, selected, cut = part
        if convolution.recomputes:
            pieces = convolution.pieces(x, kernels)
        windows = [
            [
                [
                    jnp.where(which == place, v * norm.gain, 0)
                    + (terms.slope * value + terms.constant)
                    for place, value in enumerate(window)
                ]
                for window, v, (_, which) in zip(*rows, strict=True)
            ]
            for rows in zip(_windows(pieces), cut, selected, strict=True)
        ]
        gradient, x_gradient = convolution.gradients(x, kernels, _from_windows(windows))
        return jax.tree.map(jnp.add, total, gradient), x_gradient

    zero = jax.tree.map(jnp.zeros_like, kernels)
    kernel_gradient, x_gradient = lax.scan(part, zero, (parts, pieces, selected, cut))
    return (
        _interleave(jax.tree.map(_join, x_gradient)),
        convolution.transform_gradient(kernel_gradient),
        terms.scale,
        terms.bias,
    )


train_block.defvjp(_train_block, _train_block_gradient)
