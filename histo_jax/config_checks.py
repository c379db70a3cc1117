"""Checks settings: types, limits, and names that must be registered."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from histo_jax.config import Config, fields, flat, settings_of
from histo_jax.errors import ConfigError, closest, did_you_mean
from histo_jax.registry import AUGMENTATIONS, LOSSES, MODELS, SOURCES, Registry

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a dict",
    types.NoneType: "None",
    tuple[int, ...]: "five whole numbers such as (32, 64, 128, 256, 512)",
    tuple[str, ...]: "a tuple of text such as ('blur', 'noise')",
}


def validate(config: Config, typed: Mapping[str, str] = types.MappingProxyType({})) -> None:
    """Checks every setting's type and limits.

    Args:
        config: the settings.
        typed: values as the user typed them, by dotted name, which messages then show.

    Raises:
        ConfigError: names the first field that is wrong, its value and what it must be.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"the config is a {type(config).__name__}; get_config() must return histo_jax.Config"
        )
    check_types(config)
    values = flat(config)
    for name, field in fields().items():
        value, choices = values[name], field.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(
                f"config.{name} = {value!r} must be one of {', '.join(choices)}"
                f"{did_you_mean(value, choices)}"
            )
        for limit in field.metadata["limits"]:
            if value is not None and not limit.holds(value):
                shown = typed.get(name) or repr(value)
                raise ConfigError(f"config.{name} = {shown} must be {limit.expected}")
    for registry, name, entry in _registered_names(config):
        registry.check(name, entry)


def check_types(node: Any, prefix: str = "") -> None:
    """Checks that settings have the fields of their class, and values of the right types.

    Args:
        node: a `Config`, or one of its groups.
        prefix: of the group's fields, as in `fit.`.

    Raises:
        ConfigError: names the field.
    """
    # A subclass may have other defaults, not other fields.
    own = next(kind for kind in type(node).__mro__ if kind.__module__ == Config.__module__)
    unknown = settings_of(node).keys() - {field.name for field in dataclasses.fields(own)}
    if unknown:
        raise ConfigError(unknown_field(prefix + min(unknown)))
    for field in dataclasses.fields(own):
        value = getattr(node, field.name)
        if not fits(value, field.type):
            known = type(value) in (*_TYPE_NAMES, tuple)
            but = "" if known else f", not {type_name(type(value))}"
            raise ConfigError(
                f"config.{prefix}{field.name} = {value!r} must be {type_name(field.type)}{but}"
            )
        if dataclasses.is_dataclass(field.type):
            check_types(value, f"{prefix}{field.name}.")


def unregistered(config: Config) -> list[tuple[str, str]]:
    """Returns field and name of each network, source, loss and augmentation not registered."""
    return [
        (field, name)
        for registry, field, name in _registered_names(config)
        if name not in registry.names()
    ]


def _registered_names(config: Config) -> list[tuple[Registry, str, str]]:
    return [
        (SOURCES, "data.source", config.data.source),
        (MODELS, "model.name", config.model.name),
        (LOSSES, "fit.loss", config.fit.loss),
        *((AUGMENTATIONS, "augment.extra", name) for name in config.augment.extra),
    ]


def fits(value: Any, kind: Any) -> bool:
    """Returns whether a value is of the annotated type; true where the type cannot be checked."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, option) for option in options)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in options)
    if origin is tuple and options[-1] is not ...:
        return isinstance(value, tuple) and _all_fit(value, options)
    if origin in (tuple, list, Sequence):
        return isinstance(value, tuple) and _all_fit(value, options[:1] * len(value))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    try:
        return isinstance(value, tuple if kind is list else origin or kind)
    except TypeError:
        return True


def _all_fit(values: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    return len(values) == len(kinds) and all(map(fits, values, kinds))


def type_name(kind: Any) -> str:
    """Returns a field's type in words, as in 'a whole number or None'."""
    if isinstance(kind, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(kind)))
    return _TYPE_NAMES.get(kind) or f"of type {kind.__name__}"


def likely_field(name: str) -> str | None:
    """Returns the dotted name of the field that an unknown name most likely means, if any."""
    known = list(fields())
    group, _, rest = name.partition(".")
    same_last = [f for f in known if f.rpartition(".")[2] == name.rpartition(".")[2].lower()]
    if same_last:
        return same_last[0]
    siblings = _fields_of(group)
    if not siblings:
        return closest(name, known, cutoff=0.75)
    match = closest(rest, siblings)
    return f"{group}.{match}" if match else None


def unknown_field(name: str) -> str:
    """Returns the message about an unknown dotted name, with the field most likely meant."""
    match, group = likely_field(name), name.partition(".")[0]
    hint = ""
    if match:
        hint = f"; did you mean config.{match}?"
    elif siblings := _fields_of(group):
        hint = f"; config.{group} has {', '.join(siblings)}"
    return f"unknown config field: config.{name}{hint} (see --help)"


def _fields_of(group: str) -> list[str]:
    return [field.partition(".")[2] for field in fields() if field.startswith(f"{group}.")]
