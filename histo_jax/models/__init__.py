"""The networks, behind one `create_model`."""

import flax.linen as nn

from histo_jax.config import ModelConfig
from histo_jax.models.cnn import FiveBlockCNN


def create_model(config: ModelConfig) -> nn.Module:
    """Returns the network that `config.name` names; a call maps images to logits, see its class."""
    return FiveBlockCNN(features=tuple(config.features), dense=config.dense, dropout=config.dropout)
