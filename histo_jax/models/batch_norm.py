"""BatchNorm before a 2x2 maximum: what both forms of the block need of it, and of its gradient.

Channels may be several orientations of the same features, as in `p4m.py`; all orientations of a
feature then share its statistics.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

# PyTorch's defaults. At Flax's momentum of 0.99 the running statistics lag behind short trainings
# so far that validation loss says nothing.
MOMENTUM = 0.9
EPSILON = 1e-5

Channels = Float[Array, " channels"]
Values = Float[Array, "*positions channels"]


class FoldedBatchNorm(NamedTuple):
    """BatchNorm by the statistics of a batch, as one product and one sum: float[channels] each.

    Attributes:
        mean: of the batch.
        variance: of the batch, the biased estimate.
        scale: factor of the values: the parameter `scale` over the standard deviation.
        bias: what is added then: the parameter `bias` less `mean * scale`.
    """

    mean: Channels
    variance: Channels
    scale: Channels
    bias: Channels


def fold(
    mean: Channels, variance: Channels, scale: Channels, bias: Channels
) -> tuple[Channels, Channels]:
    """Returns the folded scale and bias, so that BatchNorm is `values * scale + bias`."""
    folded_scale = scale * lax.rsqrt(variance + EPSILON)
    return folded_scale, bias - mean * folded_scale


def _mean_over_orientations(sums: Channels, count: int, orientations: int) -> Channels:
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
    """Returns BatchNorm folded from a batch's sums of `count` values and of their squares."""
    mean = _mean_over_orientations(sums, count, orientations)
    second_moment = _mean_over_orientations(squares, count, orientations)
    variance = jnp.maximum(second_moment - mean * mean, 0)
    return FoldedBatchNorm(mean, variance, *fold(mean, variance, scale, bias))


def select_maximum(
    window: list[Values], scale: Channels
) -> tuple[Values, Int8[Array, "*positions channels"]]:
    """Returns the value that is the maximum of a 2x2 window after BatchNorm, and its index.

    Args:
        window: the four values of each window before BatchNorm, row by row.
        scale: the parameter of BatchNorm; its sign decides.

    Returns:
        the value before BatchNorm; its index in `window`, the first of equal values.
    """
    # A negative scale reverses the order: the maximum after it is the minimum before it.
    sign = jnp.where(scale < 0, -1, 1).astype(window[0].dtype)
    first, second, third, fourth = (value * sign for value in window)
    maximum = jnp.maximum(jnp.maximum(first, second), jnp.maximum(third, fourth)) * sign
    is_first, is_second, is_third, _ = (value == maximum for value in window)
    argmax = jnp.where(is_first, 0, jnp.where(is_second, 1, jnp.where(is_third, 2, 3)))
    return maximum, argmax.astype(jnp.int8)


class Gradient(NamedTuple):
    """The gradient of BatchNorm, float[channels] each.

    With respect to the input it is `folded_scale * g + slope * input + constant`, where `g`, that
    of the output, is zero but for the maxima.

    Attributes:
        scale: with respect to the parameter `scale`.
        bias: with respect to the parameter `bias`.
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
    """Returns the gradient from sums over the maxima alone.

    Args:
        norm: that of the batch.
        total: sum of the output's gradient.
        weighted: sum of it times `input - mean`.
        count: values of a channel in the batch.
        orientations: how many share their statistics.
    """
    # folded_scale * (g - mean(g) - normalised * mean(g * normalised))
    inverse_std = lax.rsqrt(norm.variance + EPSILON)
    weighted_mean = _mean_over_orientations(weighted, count, orientations)
    slope = -norm.scale * inverse_std**2 * weighted_mean
    total_mean = _mean_over_orientations(total, count, orientations)
    constant = -norm.scale * total_mean - slope * norm.mean
    return Gradient(inverse_std * weighted, total, slope, constant)
