"""The plain network: convolution blocks, then dense layers."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


def max_pool(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w channels"]:
    """Returns the maxima of 2x2 windows; height and width must be even.

    Two pairwise maxima: on CPU their gradient is several times faster than `reduce_window`'s.
    """
    x = jnp.maximum(x[:, 0::2], x[:, 1::2])
    return jnp.maximum(x[:, :, 0::2], x[:, :, 1::2])


class FiveBlockCNN(nn.Module):
    """3x3 convolution, BatchNorm, 2x2 max-pooling and ReLU per block; dense, ReLU, dropout, logit.

    Attributes:
        features: channels of each block.
        dense: units of the dense layer.
        dropout: share of the dense units dropped in training.
    """

    features: tuple[int, ...]
    dense: int
    dropout: float

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
        for channels in self.features:
            # BatchNorm's own shift makes a bias before it idle.
            x = nn.Conv(channels, (3, 3), use_bias=False)(x)
            # PyTorch's defaults: at Flax's momentum of 0.99 the running statistics lag behind
            # short trainings so far that validation loss says nothing.
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
            # Maximum and ReLU commute; pooling first leaves a quarter of the values to ReLU.
            x = nn.relu(max_pool(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.dense)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(1)(x)[:, 0]
