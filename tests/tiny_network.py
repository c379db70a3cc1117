"""A network that compiles in a second, for tests of everything around a network.

Registered as 'tiny'; the config files of tests hold this text.
"""

import flax.linen as nn

import histo_jax


@histo_jax.register_model("tiny")
class Tiny(nn.Module):
    """One convolution, with BatchNorm and dropout."""

    channels: int = 4
    dropout: float = 0.1

    @nn.compact
    def __call__(self, images, train):
        x = nn.avg_pool(images, (4, 4), (4, 4))
        x = nn.Conv(self.channels, (3, 3), strides=(2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(1)(x)[:, 0]
