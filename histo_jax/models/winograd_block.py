"""The block of `block.py` in a form that is fast on one CPU; equal up to rounding.

On CPU, reading and writing arrays that do not fit the cache costs more than the arithmetic.
Therefore

- convolutions are tiled (`winograd.py`) and return output phases, so that max-pooling compares
  whole arrays and only the small result is interleaved;
- images are processed in chunks;
- the gradient of BatchNorm, max-pooling and ReLU is written by hand: its sums need only the maxima.

Height and width must be equal and even.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from histo_jax.models import batch_norm, winograd
from histo_jax.models.batch_norm import FoldedBatchNorm
from histo_jax.models.winograd import Grid, Image, Kernel, Values, interleave

# Values before pooling in one chunk of images, 10 MB in float32: the fastest of 2 to 75 MB with
# 1 MiB of L2 cache per core.
CHUNK_ELEMENTS = 2_500_000

Halved = Float[Array, "images half half features"]
Features = Float[Array, " features"]
Chunks = Float[Array, "chunks chunk_images height width channels"]
# The four phases of each 2x2 window, indexed by the row and column of the window in a tile.
Windows = list[list[list[Values]]]
# The maximum of each window and its index in the window, indexed likewise.
Maxima = list[list[tuple[Values, Int8[Array, "..."]]]]


class _Saved(NamedTuple):
    """Residuals of the forward pass for the gradient.

    Attributes:
        x: the input.
        kernel: the transformed kernel.
        phases: output phases of the convolution, in chunks; None: to be recomputed.
        maxima: maxima of the windows, in chunks.
        norm: BatchNorm with the statistics of the batch.
    """

    x: Image
    kernel: Grid
    phases: Grid | None
    maxima: Maxima
    norm: FoldedBatchNorm


def infer_block(x: Image, kernel: Kernel, scale: Features, bias: Features) -> Halved:
    """Returns the output of the block with folded BatchNorm.

    Args:
        x: the input.
        kernel: kernel of the convolution.
        scale: folded scale of BatchNorm.
        bias: folded bias of BatchNorm.
    """
    convolution = winograd.choose_convolution(x, infer=True)
    transformed = convolution.transform(kernel * scale)

    def infer_chunk(x: Image) -> Grid:
        windows = _windows(convolution.phases(x, transformed))
        return [
            [jax.nn.relu(functools.reduce(jnp.maximum, window) + bias) for window in row]
            for row in windows
        ]

    chunks = _split(x, kernel.shape[-1])
    return interleave(jax.tree.map(_join, lax.map(infer_chunk, chunks)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def train_block(
    x: Image, kernel: Kernel, scale: Features, bias: Features, orientations: int
) -> tuple[Halved, Features, Features]:
    """Returns the output of the block with the statistics of the batch, and these statistics.

    Of equal maxima the first one gets the gradient. The mean and the variance have no gradient.

    Args:
        x: the input.
        kernel: kernel of the convolution.
        scale: the parameter of BatchNorm.
        bias: the parameter of BatchNorm.
        orientations: number of orientations of each feature that share their statistics.

    Returns:
        The output; the batch mean and variance.
    """
    return _train_block(x, kernel, scale, bias, orientations)[0]


def _train_block(
    x: Image, kernel: Kernel, scale: Features, bias: Features, orientations: int
) -> tuple[tuple[Halved, Features, Features], _Saved]:
    convolution = winograd.choose_convolution(x, infer=False)
    transformed = convolution.transform(kernel)
    chunks = _split(x, kernel.shape[-1])

    def convolve(x: Image) -> tuple[Grid | None, Features, Features]:
        phases = convolution.phases(x, transformed)
        leaves = jax.tree.leaves(phases)
        sums = sum(v.sum((0, 1, 2)) for v in leaves)
        squares = sum((v * v).sum((0, 1, 2)) for v in leaves)
        return (None if convolution.recompute_phases else phases), sums, squares

    phases, sums, squares = lax.map(convolve, chunks)
    norm = batch_norm.fold_sums(
        sums.sum(0), squares.sum(0), math.prod(x.shape[:3]), scale, bias, orientations
    )

    def select_maxima(phases: Grid) -> Maxima:
        return [
            [batch_norm.select_maximum(window, scale) for window in row] for row in _windows(phases)
        ]

    if phases is None:
        maxima = lax.map(lambda x: select_maxima(convolution.phases(x, transformed)), chunks)
    else:
        maxima = select_maxima(phases)
    outputs = [
        [jax.nn.relu(_join(maximum) * norm.scale + norm.bias) for maximum, _ in row]
        for row in maxima
    ]
    saved = _Saved(x, transformed, phases, maxima, norm)
    return (interleave(outputs), norm.mean, norm.variance), saved


def _train_block_gradient(
    orientations: int, saved: _Saved, gradients: tuple[Halved, Features, Features]
) -> tuple[Image, Kernel, Features, Features]:
    x, kernel, phases, maxima, norm = saved
    convolution = winograd.choose_convolution(x, infer=False)
    chunks = _split(x, len(norm.scale))
    masked = _mask(gradients[0], maxima, norm, len(chunks))
    terms = _norm_gradient(masked, maxima, norm, math.prod(x.shape[:3]), orientations)

    def add_chunk(total: Grid, chunk: tuple[Image, Grid | None, Maxima, Grid]) -> tuple[Grid, Grid]:
        x, phases, maxima, masked = chunk
        if phases is None:
            phases = convolution.phases(x, kernel)
        phase_gradients = _phase_gradients(phases, masked, maxima, norm, terms)
        gradient, x_gradient = convolution.gradients(x, kernel, phase_gradients)
        return jax.tree.map(jnp.add, total, gradient), x_gradient

    zero = jax.tree.map(jnp.zeros_like, kernel)
    kernel_gradient, x_gradient = lax.scan(add_chunk, zero, (chunks, phases, maxima, masked))
    return (
        interleave(jax.tree.map(_join, x_gradient)),
        convolution.transform_gradient(kernel_gradient),
        terms.scale,
        terms.bias,
    )


train_block.defvjp(_train_block, _train_block_gradient)


def _mask(gradient: Halved, maxima: Maxima, norm: FoldedBatchNorm, chunks: int) -> Grid:
    """Returns the gradient of the maxima before the ReLU.

    Args:
        gradient: gradient of the output.
        maxima: maxima of the windows, in chunks.
        norm: BatchNorm with the statistics of the batch.
        chunks: number of chunks.

    Returns:
        In chunks, indexed by the row and column of the window in a tile.
    """
    size, half = len(maxima), gradient.shape[1] // len(maxima)
    windows = gradient.reshape(chunks, len(gradient) // chunks, half, size, half, size, -1)
    return [
        [
            jnp.where(maximum * norm.scale + norm.bias > 0, windows[:, :, :, i, :, j], 0)
            for j, (maximum, _) in enumerate(row)
        ]
        for i, row in enumerate(maxima)
    ]


def _norm_gradient(
    masked: Grid, maxima: Maxima, norm: FoldedBatchNorm, count: int, orientations: int
) -> batch_norm.Gradient:
    """Returns the gradient of BatchNorm, given the gradient of the maxima before the ReLU."""
    axes = (0, 1, 2, 3)
    total = functools.reduce(jnp.add, [v.sum(axes) for row in masked for v in row])
    weighted = functools.reduce(
        jnp.add,
        [
            (v * (maximum - norm.mean)).sum(axes)
            for values, row in zip(masked, maxima, strict=True)
            for v, (maximum, _) in zip(values, row, strict=True)
        ],
    )
    return batch_norm.gradient(norm, total, weighted, count, orientations)


def _phase_gradients(
    phases: Grid,
    masked: Grid,
    maxima: Maxima,
    norm: FoldedBatchNorm,
    terms: batch_norm.Gradient,
) -> Grid:
    """Returns the gradient of the output phases of the convolution, for one chunk.

    Args:
        phases: output phases of the convolution.
        masked: gradient of the maxima before the ReLU.
        maxima: maxima of the windows.
        norm: BatchNorm with the statistics of the batch.
        terms: gradient of BatchNorm.
    """
    windows = [
        [
            [
                jnp.where(argmax == index, v * norm.scale, 0)
                + (terms.slope * value + terms.constant)
                for index, value in enumerate(window)
            ]
            for window, v, (_, argmax) in zip(*rows, strict=True)
        ]
        for rows in zip(_windows(phases), masked, maxima, strict=True)
    ]
    size = range(2 * len(windows))
    return [[windows[p // 2][q // 2][2 * (p % 2) + q % 2] for q in size] for p in size]


def _windows(phases: Grid) -> Windows:
    """Returns the phases grouped by 2x2 window, row by row in each window."""
    half = range(len(phases) // 2)
    return [
        [[phases[2 * i + p][2 * j + q] for p in (0, 1) for q in (0, 1)] for j in half] for i in half
    ]


def _split(x: Image, features: int) -> Chunks:
    """Splits the images into equal chunks of at most `CHUNK_ELEMENTS` output values each."""
    count = -(-x.shape[1] * x.shape[2] * features * len(x) // CHUNK_ELEMENTS)
    count = next(k for k in range(min(count, len(x)), len(x) + 1) if len(x) % k == 0)
    return x.reshape(count, len(x) // count, *x.shape[1:])


def _join(x: Chunks) -> Image:
    """Returns the images of all chunks."""
    return x.reshape(-1, *x.shape[2:])
