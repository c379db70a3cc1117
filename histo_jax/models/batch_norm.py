"""BatchNorm followed by 2x2 max-pooling, and its gradient; shared by both forms of the block.

The channels may hold several orientations of the same features, as in `p4m.py`. All orientations of
a feature then share its statistics.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

# PyTorch's defaults. With Flax's momentum of 0.99 the running statistics lag so far behind in a
# short training that the validation loss is meaningless.
MOMENTUM = 0.9
EPSILON = 1e-5

Channels = Float[Array, " channels"]
Values = Float[Array, "*positions channels"]
Argmax = Int8[Array, "*positions channels"]


class FoldedBatchNorm(NamedTuple):
    """BatchNorm with the statistics of a batch, folded into one scale and one bias.

    Attributes:
        mean: batch mean.
        variance: batch variance, the biased estimate.
        scale: folded scale: the parameter `scale` divided by the standard deviation.
        bias: folded bias: the parameter `bias` minus `mean * folded scale`.
    """

    mean: Channels
    variance: Channels
    scale: Channels
    bias: Channels


def fold(
    mean: Channels, variance: Channels, scale: Channels, bias: Channels
) -> tuple[Channels, Channels]:
    """Returns the folded scale and bias, with which BatchNorm is `values * scale + bias`.

    Args:
        mean: batch or running mean.
        variance: batch or running variance.
        scale: the parameter of BatchNorm.
        bias: the parameter of BatchNorm.
    """
    folded_scale = scale * lax.rsqrt(variance + EPSILON)
    return folded_scale, bias - mean * folded_scale


def _mean_over_orientations(sums: Channels, count: int, orientations: int) -> Channels:
    """Returns the mean of each feature over all orientations, repeated for each orientation."""
    mean = sums.reshape(orientations, -1).sum(0) / (orientations * count)
    return jnp.tile(mean, orientations)


def fold_sums(
    sums: Channels,
    squares: Channels,
    count: int,
    scale: Channels,
    bias: Channels,
    orientations: int,
) -> FoldedBatchNorm:
    """Returns BatchNorm with the statistics of a batch.

    Args:
        sums: sum of the values of each channel.
        squares: sum of their squares.
        count: number of values of each channel.
        scale: the parameter of BatchNorm, repeated for each orientation.
        bias: likewise.
        orientations: number of orientations that share their statistics.
    """
    mean = _mean_over_orientations(sums, count, orientations)
    second_moment = _mean_over_orientations(squares, count, orientations)
    variance = jnp.maximum(second_moment - mean * mean, 0)
    return FoldedBatchNorm(mean, variance, *fold(mean, variance, scale, bias))


def select_maximum(window: list[Values], scale: Channels) -> tuple[Values, Argmax]:
    """Selects from each 2x2 window the value that is the maximum after BatchNorm.

    Args:
        window: the four values of each window before BatchNorm, row by row.
        scale: the parameter of BatchNorm; only its sign matters.

    Returns:
        The selected value, before BatchNorm, and its index in `window`; the first of equal values.
    """
    # A negative scale reverses the order: the maximum after it is the minimum before it.
    sign = jnp.where(scale < 0, -1, 1).astype(window[0].dtype)
    first, second, third, fourth = (value * sign for value in window)
    maximum = jnp.maximum(jnp.maximum(first, second), jnp.maximum(third, fourth)) * sign
    is_first, is_second, is_third, _ = (value == maximum for value in window)
    argmax = jnp.where(is_first, 0, jnp.where(is_second, 1, jnp.where(is_third, 2, 3)))
    return maximum, argmax.astype(jnp.int8)


class Gradient(NamedTuple):
    """The gradient of BatchNorm.

    The gradient of the input is `folded_scale * g + slope * input + constant`. Here `g` is the
    gradient of the output; it is zero except at the maxima.

    Attributes:
        scale: gradient of the parameter `scale`.
        bias: gradient of the parameter `bias`.
        slope: see above.
        constant: see above.
    """

    scale: Channels
    bias: Channels
    slope: Channels
    constant: Channels


def gradient(
    norm: FoldedBatchNorm, total: Channels, weighted: Channels, count: int, orientations: int
) -> Gradient:
    """Returns the gradient, computed from sums over the maxima only.

    Args:
        norm: BatchNorm with the statistics of the batch.
        total: sum of the output's gradient over the maxima.
        weighted: sum of the output's gradient times `input - mean` over the maxima.
        count: number of values of each channel in the batch, before pooling.
        orientations: number of orientations that share their statistics.
    """
    # folded_scale * (g - mean(g) - normalised * mean(g * normalised))
    inverse_std = lax.rsqrt(norm.variance + EPSILON)
    weighted_mean = _mean_over_orientations(weighted, count, orientations)
    slope = -norm.scale * inverse_std**2 * weighted_mean
    total_mean = _mean_over_orientations(total, count, orientations)
    constant = -norm.scale * total_mean - slope * norm.mean
    return Gradient(inverse_std * weighted, total, slope, constant)
