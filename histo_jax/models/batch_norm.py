"""BatchNorm before a 2x2 maximum: what both forms of the block need of it, and of its gradient.

Channels may be several runs of the same ones, `copies`, as the orientations of a symmetric network
are: statistics are then shared by the runs.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

# PyTorch's defaults. At Flax's momentum of 0.99 the running statistics lag behind short trainings
# so far that validation loss says nothing.
MOMENTUM = 0.9
EPSILON = 1e-5


class Norm(NamedTuple):
    """The normalisation of a batch, each float[channels].

    Attributes:
        mean: of the batch.
        variance: of the batch, with the full count below.
        gain: what values are multiplied by.
        shift: what is added then.
    """

    mean: Any
    variance: Any
    gain: Any
    shift: Any


def fold(mean: Any, variance: Any, scale: Any, bias: Any) -> tuple[Any, Any]:
    """Returns gain and shift."""
    gain = scale * lax.rsqrt(variance + EPSILON)
    return gain, bias - mean * gain


def _average(sums: Any, count: int, copies: int) -> Any:
    return jnp.tile(sums.reshape(copies, -1).sum(0) / (copies * count), copies)


def measure(sums: Any, squares: Any, count: int, scale: Any, bias: Any, copies: int) -> Norm:
    """Returns the normalisation from a batch's sums of `count` values and of their squares."""
    mean = _average(sums, count, copies)
    variance = jnp.maximum(_average(squares, count, copies) - mean * mean, 0)
    return Norm(mean, variance, *fold(mean, variance, scale, bias))


def select(window: list[Any], scale: Any) -> tuple[Any, Any]:
    """Returns which of a window's four arrays becomes the maximum: its value, int8 its place.

    Of equal values it is the first.
    """
    # A negative scale turns the order round: what becomes the maximum is the minimum here.
    sign = jnp.where(scale < 0, -1, 1).astype(window[0].dtype)
    first, second, third, fourth = (value * sign for value in window)
    chosen = jnp.maximum(jnp.maximum(first, second), jnp.maximum(third, fourth)) * sign
    one, two, three, _ = (value == chosen for value in window)
    which = jnp.where(one, 0, jnp.where(two, 1, jnp.where(three, 2, 3)))
    return chosen, which.astype(jnp.int8)


class Gradient(NamedTuple):
    """That of BatchNorm, each float[channels].

    With respect to the input it is `gain * g + slope * input + constant`, where `g`, that of the
    output, is zero but for the maxima.
    """

    scale: Any
    bias: Any
    slope: Any
    constant: Any


def gradient(norm: Norm, total: Any, weighted: Any, count: int, copies: int) -> Gradient:
    """Returns the gradient from sums over the maxima alone.

    Args:
        norm: that of the batch.
        total: sum of the output's gradient.
        weighted: sum of it times `input - mean`.
        count: values of a channel in the batch.
        copies: runs of channels that share statistics.
    """
    # gain * (g - mean(g) - normalised * mean(g * normalised))
    factor = lax.rsqrt(norm.variance + EPSILON)
    slope = -norm.gain * factor**2 * _average(weighted, count, copies)
    constant = -norm.gain * _average(total, count, copies) - slope * norm.mean
    return Gradient(factor * weighted, total, slope, constant)
