"""The fields of a network's class, and the check of the values that a config gives them."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from histo_jax.config_checks import fits
from histo_jax.errors import UserError, did_you_mean

Fields = dict[str, dataclasses.Field[Any]]


def init_fields(network: type[nn.Module]) -> Fields:
    """Returns the fields that the class takes, without those that every Flax module has."""
    own: Any = network  # every Flax module is a dataclass, which mypy does not know
    return {
        field.name: field
        for field in dataclasses.fields(own)
        if field.init and field.name not in ("parent", "name")
    }


def frozen(value: Any) -> Any:
    """Returns the value with tuples in place of lists: a network must be hashable."""
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def check_kwargs(
    name: str, network: type[nn.Module], fields: Fields, kwargs: Mapping[str, Any]
) -> None:
    """Refuses values that do not fit the network's fields.

    Args:
        name: of the network, for messages.
        network: its class.
        fields: those of its fields that the config may set.
        kwargs: `config.model.kwargs`.

    Raises:
        UserError: a field is unknown, missing or of another type.
    """
    kinds = _field_types(network)
    for key, value in kwargs.items():
        place = f"config.model.kwargs[{key!r}]"
        if key not in fields:
            takes = ", ".join(fields) or "none"
            raise UserError(
                f"{place} is no field of {name}, which takes {takes}{did_you_mean(key, fields)}"
            )
        kind = kinds.get(key, Any)
        if not fits(frozen(value), kind):
            raise UserError(f"{place} = {value!r} is not of type {_type_text(kind)}")
    for key, field in fields.items():
        missing = field.default is field.default_factory is dataclasses.MISSING
        if missing and key not in kwargs:
            raise UserError(f"config.model.kwargs[{key!r}] is missing: {name} needs it")


def _type_text(kind: Any) -> str:
    name = getattr(kind, "__name__", str(kind))
    return str(kind).replace("typing.", "") if typing.get_args(kind) else name


def _field_types(network: type[nn.Module]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(network)
    except (NameError, TypeError):  # annotations as text whose names cannot be found any more
        return {}
