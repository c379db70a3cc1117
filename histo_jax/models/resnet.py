"""ResNet-18: He et al., "Deep Residual Learning for Image Recognition", 2016."""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from histo_jax.models.batch_norm import EPSILON, MOMENTUM
from histo_jax.registry import register_model

Image = Float[Array, "batch height width channels"]
Features = Float[Array, "batch h w features"]


def _convolution(dtype: DTypeLike) -> Callable[..., nn.Conv]:
    """Returns a function of features, kernel size and stride that makes a convolution."""

    def make(features: int, size: int, stride: int = 1) -> nn.Conv:
        return nn.Conv(
            features,
            (size, size),
            stride,
            size // 2,
            use_bias=False,
            dtype=dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        )

    return make


def _norm(dtype: DTypeLike, train: bool) -> Callable[..., nn.BatchNorm]:
    """Returns a function that makes a BatchNorm."""
    return functools.partial(
        nn.BatchNorm, use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to their input.

    Attributes:
        features: number of output channels.
        stride: stride of the first convolution.
        dtype: dtype of the computation.
    """

    features: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Image, train: bool) -> Features:
        """Returns the block's output.

        Args:
            x: input of the block.
            train: use the statistics of the batch and update the running ones.
        """
        convolution, norm = _convolution(self.dtype), _norm(self.dtype, train)
        y = convolution(self.features, 3, self.stride)(x)
        y = nn.relu(norm()(y))
        y = convolution(self.features, 3)(y)
        # With a scale of 0 each block is initialised to the identity, which trains better: Goyal et
        # al., "Accurate, Large Minibatch SGD", 2017.
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = norm()(convolution(self.features, 1, self.stride)(x))
        return nn.relu(x + y)


@register_model("resnet18")
class ResNet18(nn.Module):
    """Four stages of two residual blocks, global average pooling, logit.

    Attributes:
        stem: `small`, a 3x3 convolution, for patches of about 96x96 pixels; or `imagenet`, a 7x7
            convolution and a 3x3 max-pooling, both with stride 2, at a sixteenth of the cost.
        width: number of channels of the first stage; each later stage doubles it.
        dtype: dtype of the computation; parameters, statistics and logits are float32.
    """

    stem: Literal["small", "imagenet"] = "small"
    width: int = 64
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> Float[Array, " batch"]:
        """Returns the tumour logit of each image.

        Args:
            images: normalised pixels.
            train: use the statistics of the batch and update the running ones.
        """
        convolution, norm = _convolution(self.dtype), _norm(self.dtype, train)
        if self.stem == "small":
            x = nn.relu(norm()(convolution(self.width, 3)(images)))
        else:
            x = nn.relu(norm()(convolution(self.width, 7, 2)(images)))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(self.width * 2**stage, stride, self.dtype)(x, train)
        x = x.mean((1, 2), dtype=jnp.float32)
        return nn.Dense(1, dtype=jnp.float32)(x)[:, 0]
