"""The networks, behind one `create_model`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from histo_jax.config import ModelConfig
from histo_jax.models.cnn import FiveBlockCNN
from histo_jax.models.p4m import FiveBlockP4M

_NETWORKS = {"five_block": FiveBlockCNN, "five_block_p4m": FiveBlockP4M}


def create_model(config: ModelConfig) -> nn.Module:
    """Returns the network that `config.name` names; a call maps images to logits, see its class.

    It computes in bfloat16 on accelerators and in float32 on CPU. On one CPU device it computes by
    tiles; over several the plain form is kept, which XLA knows to divide.
    """
    on_cpu = jax.default_backend() == "cpu"
    return _NETWORKS[config.name](
        features=tuple(config.features),
        dense=config.dense,
        dropout=config.dropout,
        dtype=jnp.float32 if on_cpu else jnp.bfloat16,
        is_tiled=on_cpu and jax.device_count() == 1,
    )
