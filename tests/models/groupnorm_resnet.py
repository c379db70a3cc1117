"""A network outside the package: residual blocks with GroupNorm, no running statistics.

python -m histo_jax.main --config=tests/models/groupnorm_resnet.py --workdir=RUN
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import histo_jax


@histo_jax.register_model("groupnorm_resnet")
class GroupNormResNet(nn.Module):
    """A residual block for each of `widths`; each block halves height and width."""

    widths: tuple[int, ...]
    groups: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(self.widths[0], (4, 4), 4, dtype=self.dtype)(images)
        for width in self.widths:
            y = nn.Conv(width, (3, 3), 2, use_bias=False, dtype=self.dtype)(x)
            y = nn.relu(nn.GroupNorm(self.groups, dtype=self.dtype)(y))
            y = nn.Conv(width, (3, 3), use_bias=False, dtype=self.dtype)(y)
            y = nn.GroupNorm(self.groups, dtype=self.dtype)(y)
            x = nn.relu(nn.Conv(width, (1, 1), 2, dtype=self.dtype)(x) + y)
        return nn.Dense(1)(x.mean((1, 2)))[:, 0]


def get_config():
    config = histo_jax.Config()
    config.data.tfds_dir = "runs/records"
    config.data.synthetic_slides = 8
    config.data.validation_fraction = 0.2
    config.model.name = "groupnorm_resnet"
    config.model.kwargs = {"widths": [8, 16, 32]}
    config.optimizer.learning_rate = 3e-3
    config.fit.epochs = 2
    return config
