"""The fields of a network class, and the check of `config.model.kwargs` against them."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from histo_jax.config_checks import fits
from histo_jax.errors import ConfigError, did_you_mean

Fields = dict[str, dataclasses.Field[Any]]


def init_fields(network: type[nn.Module]) -> Fields:
    """Returns the constructor fields of the class, by name, without those of every Flax module."""
    dataclass: Any = network  # every Flax module is a dataclass, which mypy does not know
    return {
        field.name: field
        for field in dataclasses.fields(dataclass)
        if field.init and field.name not in ("parent", "name")
    }


def frozen(value: Any) -> Any:
    """Returns the value with lists replaced by tuples, because a network must be hashable."""
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def check_kwargs(
    name: str, network: type[nn.Module], fields: Fields, kwargs: Mapping[str, Any]
) -> None:
    """Checks keyword arguments against the fields of a network.

    Args:
        name: name of the network, for messages.
        network: class of the network.
        fields: the fields that the config may set, by name.
        kwargs: `config.model.kwargs`.

    Raises:
        ConfigError: a field is unknown or missing, or has a value of the wrong type.
    """
    types = _field_types(network)
    for key, value in kwargs.items():
        setting = f"config.model.kwargs[{key!r}]"
        if key not in fields:
            names = ", ".join(fields) or "none"
            raise ConfigError(
                f"{setting} is not a field of {name}; its fields: {names}"
                f"{did_you_mean(key, fields)}"
            )
        field_type = types.get(key, Any)
        if not fits(frozen(value), field_type):
            raise ConfigError(f"{setting} = {value!r} is not of type {_type_name(field_type)}")
    for key, field in fields.items():
        is_required = field.default is field.default_factory is dataclasses.MISSING
        if is_required and key not in kwargs:
            raise ConfigError(f"config.model.kwargs[{key!r}] is missing: {name} requires it")


def _type_name(field_type: Any) -> str:
    name = getattr(field_type, "__name__", str(field_type))
    return str(field_type).replace("typing.", "") if typing.get_args(field_type) else name


def _field_types(network: type[nn.Module]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(network)
    except (NameError, TypeError):  # string annotations with names that cannot be resolved
        return {}
