"""One block of the networks: 3x3 convolution, BatchNorm, 2x2 maximum, ReLU."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from histo_jax.models import norm as norms
from histo_jax.models import tiled


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm_pool_relu(
    y: Float[Array, "batch height width channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    copies: int,
) -> tuple[
    Float[Array, "batch h w channels"], Float[Array, " channels"], Float[Array, " channels"]
]:
    """Returns BatchNorm with the batch's own statistics, 2x2 maximum, ReLU; mean; variance.

    Statistics are float32 whatever the type of `y`, and shared by `copies` runs of channels. The
    gradient, through the output alone and of equal maxima to the first, is written out: its sums
    need only the maxima, a quarter of the values, and the whole is read once and written once.
    """
    return _norm_pool_relu(y, scale, bias, copies)[0]


def _norm_pool_relu(y: Any, scale: Any, bias: Any, copies: int) -> Any:
    wide = y.astype(scale.dtype)
    sums, squares = wide.sum((0, 1, 2)), (wide * wide).sum((0, 1, 2))
    norm = norms.measure(sums, squares, math.prod(y.shape[:3]), scale, bias, copies)
    chosen, which = norms.select(_windows(y), scale)
    output = nn.relu(chosen * norm.gain + norm.shift).astype(y.dtype)
    return (output, norm.mean, norm.variance), (y, chosen, which, norm)


def _norm_pool_relu_gradient(copies: int, saved: Any, gradients: Any) -> Any:
    y, chosen, which, norm = saved
    passed = chosen * norm.gain + norm.shift > 0
    gradient = jnp.where(passed, gradients[0].astype(norm.gain.dtype), 0)
    total = gradient.sum((0, 1, 2))
    weighted = (gradient * (chosen - norm.mean)).sum((0, 1, 2))
    terms = norms.gradient(norm, total, weighted, math.prod(y.shape[:3]), copies)
    batch, height, width, channels = y.shape
    windows = (batch, height // 2, 2, width // 2, 2, channels)
    place = jnp.arange(4, dtype=jnp.int8).reshape(2, 1, 2, 1)
    chosen_alone = jnp.where(
        which[:, :, None, :, None] == place, (gradient * norm.gain)[:, :, None, :, None], 0
    )
    y_gradient = chosen_alone + (terms.slope * y.reshape(windows) + terms.constant)
    return y_gradient.reshape(y.shape).astype(y.dtype), terms.scale, terms.bias


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

    # Runs of `features` channels that share scale, bias and statistics.
    copies = 1

    def kernel_shape(self, channels: int) -> tuple[int, ...]:
        """Returns the shape of the parameter that the kernel is made of."""
        return (3, 3, channels, self.features)

    def make_kernel(self, weights: Any) -> Float[Array, "3 3 channels outputs"]:
        """Returns the kernel to `copies * features` channels from that parameter."""
        return weights

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch h w outputs"]:
        """Returns the block's output; `train` uses and notes down the batch's own statistics."""
        # Without a bias: BatchNorm's own makes it idle.
        shape = self.kernel_shape(x.shape[-1])
        kernel = self.make_kernel(self.param("kernel", nn.initializers.lecun_normal(), shape))
        scale = self.param("scale", nn.initializers.ones, self.features)
        bias = self.param("bias", nn.initializers.zeros, self.features)
        mean = self.variable("batch_stats", "mean", jnp.zeros, self.features)
        variance = self.variable("batch_stats", "var", jnp.ones, self.features)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if train:
            scale, bias = jnp.tile(scale, self.copies), jnp.tile(bias, self.copies)
            if self.is_tiled:
                x, *batch = tiled.train_block(x, kernel, scale, bias, self.copies)
            else:
                x, *batch = norm_pool_relu(_convolve(x, kernel), scale, bias, self.copies)
            for running, new in zip((mean, variance), batch, strict=True):
                new = new[: self.features]
                running.value = norms.MOMENTUM * running.value + (1 - norms.MOMENTUM) * new
            return x
        gain, shift = (
            jnp.tile(v, self.copies) for v in norms.fold(mean.value, variance.value, scale, bias)
        )
        if self.is_tiled:
            return tiled.infer_block(x, kernel, gain, shift)
        return nn.relu(max_pool(_convolve(x, kernel) * gain + shift)).astype(self.dtype)
