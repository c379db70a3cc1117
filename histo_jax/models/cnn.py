"""The plain network: convolution blocks, then dense layers."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from histo_jax.models import tiled

# PyTorch's defaults. At Flax's momentum of 0.99 the running statistics lag behind short trainings
# so far that validation loss says nothing.
_MOMENTUM = 0.9
_EPSILON = 1e-5


def _convolve(x: Any, kernel: Any) -> Any:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _windows(x: Any) -> list[Any]:
    """Returns the four values of each 2x2 window, row by row."""
    return [x[:, p::2, q::2] for p in (0, 1) for q in (0, 1)]


def max_pool(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w channels"]:
    """Returns the maxima of 2x2 windows; height and width must be even."""
    # Not `reduce_window`: its gradient is several times slower on CPU.
    return functools.reduce(jnp.maximum, _windows(x))


@jax.custom_vjp
def norm_pool_relu(
    y: Float[Array, "batch height width channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
) -> tuple[
    Float[Array, "batch h w channels"], Float[Array, " channels"], Float[Array, " channels"]
]:
    """Returns BatchNorm with the batch's own statistics, 2x2 maximum, ReLU; mean; variance.

    Statistics are float32 whatever the type of `y`. The gradient, through the output alone and of
    equal maxima to the first, is written out: its sums need only the maxima, a quarter of the
    values, and the whole is read once and written once.
    """
    return _norm_pool_relu(y, scale, bias)[0]


def _norm_pool_relu(y: Any, scale: Any, bias: Any) -> Any:
    wide = y.astype(scale.dtype)
    mean = wide.mean((0, 1, 2))
    variance = jnp.maximum((wide * wide).mean((0, 1, 2)) - mean * mean, 0)
    gain = scale * lax.rsqrt(variance + _EPSILON)
    shift = bias - mean * gain
    # A negative gain turns the order round: what becomes the maximum is the minimum here.
    sign = jnp.where(scale < 0, -1, 1).astype(y.dtype)
    chosen = max_pool(y * sign) * sign
    first, second, third, _ = (v == chosen for v in _windows(y))
    which = jnp.where(first, 0, jnp.where(second, 1, jnp.where(third, 2, 3))).astype(jnp.int8)
    output = nn.relu(chosen * gain + shift).astype(y.dtype)
    factor = lax.rsqrt(variance + _EPSILON)
    return (output, mean, variance), (y, chosen, which, mean, factor, gain, shift)


def _norm_pool_relu_gradient(saved: Any, gradients: Any) -> Any:
    y, chosen, which, mean, factor, gain, shift = saved
    gradient = jnp.where(chosen * gain + shift > 0, gradients[0].astype(gain.dtype), 0)
    bias_gradient = gradient.sum((0, 1, 2))
    scale_gradient = factor * (gradient * (chosen - mean)).sum((0, 1, 2))
    # BatchNorm's gradient: gain * (g - mean(g) - normalised * mean(g * normalised)), where g is
    # zero but for the maxima; the last two terms are `slope * value + constant`.
    count = math.prod(y.shape[:3])
    slope = -gain * factor * scale_gradient / count
    constant = -gain * bias_gradient / count - slope * mean
    batch, height, width, channels = y.shape
    windows = (batch, height // 2, 2, width // 2, 2, channels)
    place = jnp.arange(4, dtype=jnp.int8).reshape(2, 1, 2, 1)
    chosen_alone = jnp.where(
        which[:, :, None, :, None] == place, (gradient * gain)[:, :, None, :, None], 0
    )
    y_gradient = chosen_alone + (slope * y.reshape(windows) + constant)
    return y_gradient.reshape(y.shape).astype(y.dtype), scale_gradient, bias_gradient


norm_pool_relu.defvjp(_norm_pool_relu, _norm_pool_relu_gradient)


class Block(nn.Module):
    """3x3 convolution, BatchNorm, 2x2 maximum, ReLU.

    Attributes:
        features: channels of the output.
        dtype: type of the arithmetic; parameters and statistics are float32.
        is_tiled: whether to compute by `histo_jax.models.tiled`.
    """

    features: int
    dtype: DTypeLike
    is_tiled: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch h w {self.features}"]:
        """Returns the block's output; `train` uses and notes down the batch's own statistics."""
        # Without a bias: BatchNorm's own makes it idle.
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features)
        )
        scale = self.param("scale", nn.initializers.ones, self.features)
        bias = self.param("bias", nn.initializers.zeros, self.features)
        mean = self.variable("batch_stats", "mean", jnp.zeros, self.features)
        variance = self.variable("batch_stats", "var", jnp.ones, self.features)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if train:
            if self.is_tiled:
                x, *batch = tiled.train_block(x, kernel, scale, bias, _EPSILON)
            else:
                x, *batch = norm_pool_relu(_convolve(x, kernel), scale, bias)
            for running, new in zip((mean, variance), batch, strict=True):
                running.value = _MOMENTUM * running.value + (1 - _MOMENTUM) * new
            return x
        gain = scale * lax.rsqrt(variance.value + _EPSILON)
        shift = bias - mean.value * gain
        if self.is_tiled:
            return tiled.infer_block(x, kernel, gain, shift)
        return nn.relu(max_pool(_convolve(x, kernel) * gain + shift)).astype(self.dtype)


class FiveBlockCNN(nn.Module):
    """`Block` five times; dense, ReLU, dropout, logit.

    Attributes:
        features: channels of each block.
        dense: units of the dense layer.
        dropout: share of the dense units dropped in training.
        dtype: type of the arithmetic; parameters, statistics and logits are float32.
        is_tiled: whether blocks of 16 features or more compute by `histo_jax.models.tiled`.
    """

    features: tuple[int, ...]
    dense: int
    dropout: float
    dtype: DTypeLike = jnp.float32
    is_tiled: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> Float[Array, " batch"]:
        """Returns one tumour logit an image.

        Args:
            images: normalised pixels; height and width must divide by 2 for every block.
            train: use the batch's own statistics (and update the running ones) and drop units;
                needs the random stream `dropout`.
        """
        x = images
        for features in self.features:
            # Tiles pay when their matrix products are not tiny, and take longer to compile.
            x = Block(features, self.dtype, self.is_tiled and features >= 16)(x, train)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.dense, dtype=self.dtype)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(1, dtype=jnp.float32)(x)[:, 0]
