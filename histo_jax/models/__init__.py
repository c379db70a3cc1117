"""The networks. `create_model` builds the one that is registered as `config.model.name`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from histo_jax.config import ModelConfig
from histo_jax.errors import ConfigError
from histo_jax.models.fields import check_kwargs, frozen, init_fields
from histo_jax.registry import MODELS

__all__ = ["create_model"]

_DEFAULTS = ModelConfig()
# Fields of `ModelConfig` that are passed to networks that list them in `config_fields`. All other
# fields of a network are set by `ModelConfig.kwargs`.
_CONFIG_FIELDS = ("features", "dense", "dropout")


def create_model(config: ModelConfig) -> nn.Module:
    """Builds the network that `config` describes.

    It computes in bfloat16 on accelerators and in float32 on CPU. On a single CPU device the
    five-block networks use Winograd convolutions; on several devices they use plain convolutions,
    which XLA can partition.

    Args:
        config: name and fields of the network.

    Returns:
        The module; see `register_model` for its inputs and outputs.

    Raises:
        ConfigError: the name is not registered, or a field does not fit the network.
    """
    MODELS.check("model.name", config.name)
    network = MODELS.get(config.name)
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise ConfigError(f"model {config.name!r} must be a subclass of flax.linen.Module")
    fields = init_fields(network)
    own = getattr(network, "config_fields", ())
    for field in _CONFIG_FIELDS:
        if field not in own and getattr(config, field) != getattr(_DEFAULTS, field):
            raise ConfigError(
                f"config.model.{field} is not used by {config.name}: remove it (a recipe may "
                "set it: start from histo_jax.Config()), and set the fields of this network with "
                "config.model.kwargs"
            )
    device_fields = {name: value for name, value in _device_fields().items() if name in fields}
    settable = {k: v for k, v in fields.items() if k not in own and k not in device_fields}
    check_kwargs(config.name, network, settable, config.kwargs)
    values = {name: frozen(getattr(config, name)) for name in own}
    values |= {name: frozen(value) for name, value in config.kwargs.items()}
    return network(**values, **device_fields)


def _device_fields() -> dict[str, Any]:
    """Returns the fields that depend on the device, for networks that have them."""
    on_cpu = jax.default_backend() == "cpu"
    return {
        "dtype": jnp.float32 if on_cpu else jnp.bfloat16,
        "use_winograd": on_cpu and jax.device_count() == 1,
    }
