"""Where a command's settings come from: a config file, a recipe, or the run's own `config.json`."""

import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from histo_jax import config_files, recipes
from histo_jax.config import Config, ConfigFile, flat, set_field
from histo_jax.config_checks import unregistered, validate
from histo_jax.errors import ConfigError, UserError
from histo_jax.run.saved_config import LOCATIONS, SavedConfig
from histo_jax.run.workdir import CONFIG_NAME, Workdir

# Modes that use a trained run and change nothing of it.
READING_MODES = ("evaluate", "predict", "report", "audit", "explain", "export", "heatmap")
# What these modes take from the config file although the run has settings of its own...
_OF_THE_COMMAND = ("evaluate.", "predict.", "explain.", "export.", "heatmap.")
# ... and what only if the file sets it: a folder left out does not mean the default one.
_IF_SET = (*LOCATIONS, "predict.checkpoints")


def resolve(
    given: str | None, workdir: Path | None, mode: str, typed: Collection[str]
) -> tuple[Config, list[str]]:
    """Returns a command's settings, before those on its command line, and what to log of them.

    Args:
        given: value of `--config`, see `load`; None takes the settings of the run in `workdir`.
        workdir: folder of the run, if one is named.
        mode: of the command.
        typed: dotted names of the fields that the command line sets itself.

    Raises:
        UserError: there are no settings, or they cannot be used.
        OSError: a file cannot be read.
    """
    run = Workdir(workdir) if workdir else None
    if run:
        run.check_path()
    saved = run.saved_config() if run else None
    if saved is None:
        if given is not None:
            return load(given), []
        if mode == "compare":
            return Config(), []
        raise ConfigError(
            f"--config is missing, and --workdir={workdir} is not the folder of a run (it has no "
            f"{CONFIG_NAME}): give --config=FILE, or another --workdir"
        )
    if given is None:
        return _with_registrations(saved, executes_code=True)
    if mode not in READING_MODES:
        return load(given), []
    file = load(given)  # first: it may register what the run's settings name
    own, _ = _with_registrations(saved)
    own.config_file = file.config_file or own.config_file
    return _merge(own, file, given, saved.path, typed)


def load(given: str) -> Config:
    """Returns the settings that `--config` names; a config file is executed once.

    Args:
        given: path of a Python file with `get_config()`, `FILE:ARGUMENT` for
            `get_config(ARGUMENT)`, the name of a recipe, or path of a run's `config.json`.

    Raises:
        UserError: there is no such file, or it cannot be used; names it, and the line.
        OSError: it cannot be read.
    """
    path, argument = config_files.find(given)
    if path.suffix == ".json":
        return _with_registrations(SavedConfig.read(path))[0]
    return config_files.execute(path, argument)


def load_run_config(workdir: str | os.PathLike[str]) -> Config:
    """Returns the settings of a run; those that it does not know yet have their default.

    Executes the config file that the run came from where that registers something, once a process:
    a network of the same name from another file is then refused.

    Args:
        workdir: folder of the run.

    Raises:
        UserError: the folder is not a run's; its settings are corrupt or of another version; or
            its network (loss, augmentation, source) is registered nowhere.
    """
    saved = Workdir(workdir).saved_config()
    if saved is None:
        raise ConfigError(f"{workdir} is not the folder of a run: it has no {CONFIG_NAME}")
    file = saved.config_file
    is_executed = file is not None and config_files.module_name(Path(file.path)) in sys.modules
    return _with_registrations(saved, executes_code=not is_executed)[0]


def register_missing(config: Config, run: Workdir) -> None:
    """Executes the run's config file where `config` names what is not registered.

    Args:
        config: settings of a command, as a program gives them.
        run: folder of the run, which need not exist.
    """
    if unregistered(config) and (saved := run.saved_config()):
        _with_registrations(saved)


def _with_registrations(
    saved: SavedConfig, executes_code: bool = False
) -> tuple[Config, list[str]]:
    """Returns a run's settings, registered and valid, and what to log of them.

    Args:
        saved: the run's `config.json`.
        executes_code: execute the config file also where its code registers nothing that is
            missing; to be done once a process.
    """
    config, notes = saved.to_config(), []
    missing, file = unregistered(config), saved.config_file
    if missing and not file:
        field, name = missing[0]
        raise ConfigError(
            f"{saved.path}: config.{field} = {name!r} is not registered, and the run was not "
            "started with a config file: give --config=FILE that registers it, or import its "
            "module first"
        )
    if file and (missing or (executes_code and file.code_hash)):
        path = _path(file)
        if path:
            config.config_file = config_files.execute(path, file.argument).config_file
        elif missing:
            field, name = missing[0]
            raise ConfigError(
                f"{saved.path}: config.{field} = {name!r} is registered nowhere, and the config "
                f"file {file.path} is gone: restore it, or give --config=FILE that registers it"
            )
        else:
            notes = [f"{file.path}, with code that the run was trained with, is gone"]
    try:
        validate(config)
    except UserError as error:
        raise ConfigError(f"{saved.path}: {error}") from None
    return config, notes


def _path(file: ConfigFile) -> Path | None:
    """Returns where a run's config file is now, None if it is gone."""
    path = Path(file.path)
    if path.is_file():
        return path
    return recipes.path(file.recipe) if file.recipe else None


def _merge(
    own: Config, file: Config, given: str, path: Path, typed: Collection[str]
) -> tuple[Config, list[str]]:
    """Returns the run's settings, with the file's folders and what to evaluate and predict."""
    values, given_values, defaults = flat(own), flat(file), flat(Config())
    differing = []
    for name, value in given_values.items():
        if name in _IF_SET:
            set_field(own, name, values[name] if value == defaults[name] else value)
        elif name.startswith(_OF_THE_COMMAND):
            set_field(own, name, value)
        elif name not in typed and not _is_same(name, value, values[name]):
            differing.append(name)
    if "data.source" in differing:
        raise ConfigError(
            f"--config={given} is for other data than the run: data.source is "
            f"{given_values['data.source']!r} there and {values['data.source']!r} in {path}; "
            "choose another --workdir, or leave --config out"
        )
    if not differing:
        return own, []
    fields = ", ".join(differing)
    return own, [f"settings are those of {path}; {given} differs from them in {fields}"]


def _is_same(name: str, one: Any, other: Any) -> bool:
    if name == "data.slide_map" and one and other:
        one, other = os.path.abspath(one), os.path.abspath(other)
    if name == "model.kwargs":  # the run's are from JSON, which has no tuples
        one, other = (json.loads(json.dumps(value)) for value in (one, other))
    return bool(one == other)
