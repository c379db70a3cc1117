"""The block of the networks: 3x3 convolution, BatchNorm, 2x2 max-pooling, ReLU."""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from histo_jax.models import batch_norm, winograd_block
from histo_jax.models.batch_norm import FoldedBatchNorm

Image = Float[Array, "batch height width channels"]
Pooled = Float[Array, "batch h w channels"]
Channels = Float[Array, " channels"]


def _convolve(
    x: Image, kernel: Float[Array, "3 3 channels outputs"]
) -> Float[Array, "batch height width outputs"]:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _windows(x: Image) -> list[Pooled]:
    """Returns the four values of each 2x2 window, row by row."""
    return [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]


def max_pool(x: Image) -> Pooled:
    """Returns the maxima of 2x2 windows; height and width must be even."""
    # The gradient of `reduce_window` is several times slower on CPU.
    return functools.reduce(jnp.maximum, _windows(x))


class _Saved(NamedTuple):
    """Residuals of `norm_pool_relu` for its gradient.

    Attributes:
        y: the input.
        maximum: the maximum of each window, before BatchNorm.
        argmax: its index in the window.
        norm: BatchNorm with the statistics of the batch.
    """

    y: Image
    maximum: Pooled
    argmax: Int8[Array, "batch h w channels"]
    norm: FoldedBatchNorm


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm_pool_relu(
    y: Image, scale: Channels, bias: Channels, orientations: int
) -> tuple[Pooled, Channels, Channels]:
    """Applies BatchNorm with the statistics of the batch, 2x2 max-pooling and ReLU.

    The gradient is written by hand: its sums need only the maxima, a quarter of the values, and the
    input is read and its gradient written once. Of equal maxima the first one gets the gradient.
    The mean and the variance have no gradient.

    Args:
        y: output of the convolution.
        scale: the parameter of BatchNorm.
        bias: the parameter of BatchNorm.
        orientations: number of orientations of each feature that share their statistics.

    Returns:
        The output in the dtype of `y`; the batch mean and variance, float32.
    """
    return _norm_pool_relu(y, scale, bias, orientations)[0]


def _norm_pool_relu(
    y: Image, scale: Channels, bias: Channels, orientations: int
) -> tuple[tuple[Pooled, Channels, Channels], _Saved]:
    wide = y.astype(scale.dtype)
    sums, squares = wide.sum((0, 1, 2)), (wide * wide).sum((0, 1, 2))
    norm = batch_norm.fold_sums(sums, squares, math.prod(y.shape[:3]), scale, bias, orientations)
    maximum, argmax = batch_norm.select_maximum(_windows(y), scale)
    output = nn.relu(maximum * norm.scale + norm.bias).astype(y.dtype)
    return (output, norm.mean, norm.variance), _Saved(y, maximum, argmax, norm)


def _norm_pool_relu_gradient(
    orientations: int, saved: _Saved, gradients: tuple[Pooled, Channels, Channels]
) -> tuple[Image, Channels, Channels]:
    y, maximum, argmax, norm = saved
    is_active = maximum * norm.scale + norm.bias > 0
    gradient = jnp.where(is_active, gradients[0].astype(norm.scale.dtype), 0)
    total = gradient.sum((0, 1, 2))
    weighted = (gradient * (maximum - norm.mean)).sum((0, 1, 2))
    terms = batch_norm.gradient(norm, total, weighted, math.prod(y.shape[:3]), orientations)
    batch, height, width, channels = y.shape
    windows = (batch, height // 2, 2, width // 2, 2, channels)
    index = jnp.arange(4, dtype=jnp.int8).reshape(2, 1, 2, 1)
    through_maxima = jnp.where(
        argmax[:, :, None, :, None] == index, (gradient * norm.scale)[:, :, None, :, None], 0
    )
    y_gradient = through_maxima + (terms.slope * y.reshape(windows) + terms.constant)
    return y_gradient.reshape(y.shape).astype(y.dtype), terms.scale, terms.bias


norm_pool_relu.defvjp(_norm_pool_relu, _norm_pool_relu_gradient)


class Block(nn.Module):
    """3x3 convolution, BatchNorm, 2x2 max-pooling, ReLU.

    Attributes:
        features: number of output features.
        dtype: dtype of the computation; parameters and statistics are float32.
        use_winograd: compute with `histo_jax.models.winograd_block`.
    """

    features: int
    dtype: DTypeLike
    use_winograd: bool

    # Output channels of each feature; they share scale, bias and statistics.
    orientations = 1

    def kernel_shape(self, channels: int) -> tuple[int, ...]:
        """Returns the shape of the parameter `kernel` for an input of `channels` channels."""
        return (3, 3, channels, self.features)

    def make_kernel(self, weights: Float[Array, "..."]) -> Float[Array, "3 3 channels outputs"]:
        """Returns the convolution kernel, with `orientations * features` outputs.

        Args:
            weights: the parameter `kernel`.
        """
        return weights

    @nn.compact
    def __call__(self, x: Image, train: bool) -> Float[Array, "batch h w outputs"]:
        """Returns the block's output.

        Args:
            x: height and width must be even.
            train: use the statistics of the batch and update the running ones.
        """
        # The convolution needs no bias: BatchNorm has one.
        shape = self.kernel_shape(x.shape[-1])
        kernel = self.make_kernel(self.param("kernel", nn.initializers.lecun_normal(), shape))
        scale = self.param("scale", nn.initializers.ones, self.features)
        bias = self.param("bias", nn.initializers.zeros, self.features)
        mean = self.variable("batch_stats", "mean", jnp.zeros, self.features)
        variance = self.variable("batch_stats", "var", jnp.ones, self.features)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if not train:
            folded = batch_norm.fold(mean.value, variance.value, scale, bias)
            return self._infer(x, kernel, *(jnp.tile(v, self.orientations) for v in folded))
        scale, bias = jnp.tile(scale, self.orientations), jnp.tile(bias, self.orientations)
        if self.use_winograd:
            x, *batch = winograd_block.train_block(x, kernel, scale, bias, self.orientations)
        else:
            x, *batch = norm_pool_relu(_convolve(x, kernel), scale, bias, self.orientations)
        momentum = batch_norm.MOMENTUM
        for running, new in zip((mean, variance), batch, strict=True):
            running.value = momentum * running.value + (1 - momentum) * new[: self.features]
        return x

    def _infer(
        self,
        x: Image,
        kernel: Float[Array, "3 3 channels outputs"],
        scale: Float[Array, " outputs"],
        bias: Float[Array, " outputs"],
    ) -> Float[Array, "batch h w outputs"]:
        if self.use_winograd:
            return winograd_block.infer_block(x, kernel, scale, bias)
        return nn.relu(max_pool(_convolve(x, kernel) * scale + bias)).astype(self.dtype)
