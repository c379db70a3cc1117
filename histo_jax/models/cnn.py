"""The plain five-block network: convolution blocks, then dense layers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from histo_jax.models.block import Block
from histo_jax.registry import register_model


@register_model("five_block")
class FiveBlockCNN(nn.Module):
    """Five blocks, then dense, ReLU, dropout and logit.

    Attributes:
        features: number of features of each block.
        dense: number of units of the dense layer.
        dropout: fraction of the dense units that are dropped in training.
        dtype: dtype of the computation; parameters, statistics and logits are float32.
        use_winograd: compute blocks with 16 or more output channels with `winograd_block.py`.
    """

    features: tuple[int, ...]
    dense: int
    dropout: float
    dtype: DTypeLike = jnp.float32
    use_winograd: bool = False

    # Fields that are set by the fields of the same name in `config.model`.
    config_fields = ("features", "dense", "dropout")
    block = Block

    def flatten(self, x: Float[Array, "batch h w channels"]) -> Float[Array, "batch values"]:
        """Returns the input of the dense layer, given the output of the last block."""
        return x.reshape(x.shape[0], -1)

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> Float[Array, " batch"]:
        """Returns the tumour logit of each image.

        Args:
            images: normalised pixels; height and width must be divisible by 2 once per block.
            train: use the statistics of the batch, update the running ones, and apply dropout;
                needs the random stream `dropout`.
        """
        x = images
        for i, features in enumerate(self.features):
            # With few channels the matrix products are too small to gain anything, and Winograd
            # takes longer to compile.
            use_winograd = self.use_winograd and features * self.block.orientations >= 16
            x = self.block(features, self.dtype, use_winograd, name=f"Block_{i}")(x, train)
        x = self.flatten(x)
        x = nn.relu(nn.Dense(self.dense, dtype=self.dtype)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(1, dtype=jnp.float32)(x)[:, 0]
