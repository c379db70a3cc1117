"""The networks: `create_model` makes one from the class registered as `config.model.name`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from histo_jax.config import ModelConfig
from histo_jax.errors import UserError
from histo_jax.models.fields import check_kwargs, frozen, init_fields
from histo_jax.registry import MODELS

__all__ = ["create_model"]

_DEFAULTS = ModelConfig()
# Fields of `ModelConfig` that set the fields of the same name of classes that list them in
# `config_fields`; all other fields of a network come from `ModelConfig.kwargs`.
_CONFIG_FIELDS = ("features", "dense", "dropout")


def create_model(config: ModelConfig) -> nn.Module:
    """Returns the network that `config` describes; see `register_model` for what a call does.

    It computes in bfloat16 on accelerators and in float32 on CPU. On one CPU device the networks of
    five blocks compute by tiles; over several the plain form is kept, which XLA can partition.

    Raises:
        UserError: the name is not registered, or a field does not fit the network.
    """
    MODELS.check("model.name", config.name)
    network = MODELS.get(config.name)
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise UserError(f"model {config.name!r} must be a class of flax.linen.Module")
    fields = init_fields(network)
    own = getattr(network, "config_fields", ())
    for field in _CONFIG_FIELDS:
        if field not in own and getattr(config, field) != getattr(_DEFAULTS, field):
            raise UserError(
                f"config.model.{field} is not used by {config.name}: leave it out, and set the "
                "fields of this network by config.model.kwargs"
            )
    by_device = {name: value for name, value in _by_device().items() if name in fields}
    settable = {k: v for k, v in fields.items() if k not in own and k not in by_device}
    check_kwargs(config.name, network, settable, config.kwargs)
    values = {name: frozen(getattr(config, name)) for name in own}
    values |= {name: frozen(value) for name, value in config.kwargs.items()}
    return network(**values, **by_device)


def _by_device() -> dict[str, Any]:
    on_cpu = jax.default_backend() == "cpu"
    return {
        "dtype": jnp.float32 if on_cpu else jnp.bfloat16,
        "use_winograd": on_cpu and jax.device_count() == 1,
    }
