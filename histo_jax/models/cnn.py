"""The plain network: convolution blocks, then dense layers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from histo_jax.models.block import Block
from histo_jax.registry import register_model


@register_model("five_block")
class FiveBlockCNN(nn.Module):
    """`Block` five times; dense, ReLU, dropout, logit.

    Attributes:
        features: channels of each block.
        dense: units of the dense layer.
        dropout: fraction of the dense units dropped in training.
        dtype: type of the arithmetic; parameters, statistics and logits are float32.
        use_winograd: whether blocks of 16 channels or more compute by `winograd_block.py`.
    """

    features: tuple[int, ...]
    dense: int
    dropout: float
    dtype: DTypeLike = jnp.float32
    use_winograd: bool = False

    # These fields are set by the fields of `config.model` of the same names.
    config_fields = ("features", "dense", "dropout")
    block = Block

    def flatten(self, x: Float[Array, "batch h w channels"]) -> Float[Array, "batch values"]:
        """Returns what the dense layer sees of the last block's output."""
        return x.reshape(x.shape[0], -1)

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
        for i, features in enumerate(self.features):
            # Tiles pay when their matrix products are not tiny, and take longer to compile.
            use_winograd = self.use_winograd and features * self.block.orientations >= 16
            x = self.block(features, self.dtype, use_winograd, name=f"Block_{i}")(x, train)
        x = self.flatten(x)
        x = nn.relu(nn.Dense(self.dense, dtype=self.dtype)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(1, dtype=jnp.float32)(x)[:, 0]
