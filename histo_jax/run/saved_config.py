"""`config.json`: the settings of a run as it saves, reads and compares them."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from histo_jax.config import TISSUE_WORDS, Config, ConfigFile, flat, set_field
from histo_jax.config_values import folders
from histo_jax.errors import ConfigError, UserError
from histo_jax.version import VERSION

# A difference in one of these makes it another run, which needs another folder. The rest
# (lengths, folders, what to evaluate) may change between two starts.
_IDENTITY_PREFIXES = (
    "seed", "data.", "model.", "augment.", "optimizer.", "fit.batch_size", "fit.steps_per_",
    "fit.loss", "fit.crop_",
)  # fmt: skip
# Where the data is stored: never part of a run's identity.
LOCATIONS = ("data.raw_dir", "data.table", "data.tfds_dir", "data.records", "data.placement")
# Scale and labelled region of the patches, which training does not use.
_DESCRIPTIONS = ("data.label_region", "data.mpp")
# Saved as absolute paths, so that a start from another folder means the same files.
_PATHS = (
    "data.raw_dir", "data.table", "data.tfds_dir", "data.slide_map", "predict.images",
    "heatmap.tissue",
)  # fmt: skip
_LISTS_OF_PATHS = ("predict.checkpoints", "heatmap.slides")
# Values of these fields that are words, not paths.
_WORDS = {"heatmap.tissue": TISSUE_WORDS}
# What one command scores instead of the split: the next one scores the split again.
_NOT_SAVED = ("evaluate.slides",)
# Keys beside the settings.
_VERSION, _SOURCE, _CONFIG_FILE = "version", "source", "config_file"


def plain(config: Config) -> dict[str, Any]:
    """Returns the settings as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(flat(config)))


@dataclasses.dataclass(frozen=True)
class SavedConfig:
    """What a `config.json` holds.

    Attributes:
        path: of the file.
        settings: as JSON values, by dotted name.
        source: SHA-256 of the source code that trained the run, by module or file name.
        config_file: the config file that the settings came from, if any.
    """

    path: Path
    settings: dict[str, Any]
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    config_file: ConfigFile | None = None

    @classmethod
    def read(cls, path: Path) -> "SavedConfig":
        """Reads a `config.json`.

        Raises:
            UserError: it is corrupt, or of version 0.1.0.
        """
        values = _read_json(path)
        if not isinstance(values.pop(_VERSION, None), str):
            raise UserError(
                f"{path} was written by histo_jax 0.1.0, which {VERSION} cannot use: choose "
                "another --workdir"
            )
        source, file = values.pop(_SOURCE, {}), values.pop(_CONFIG_FILE, None)
        try:
            config_file = ConfigFile(**file) if file else None
        except TypeError:
            raise _corrupt(path) from None
        return cls(path, values, source if isinstance(source, dict) else {}, config_file)

    def to_config(self) -> Config:
        """Returns the settings; those that the file lacks have their default. Validates nothing.

        Raises:
            ConfigError: the file holds a setting that this version does not know.
        """
        config = Config()
        known = flat(config)
        for name, value in self.settings.items():
            if name not in known:
                raise ConfigError(
                    f"{self.path} was written by another version of histo_jax: this one has no "
                    f"setting {name}; use that version"
                )
            is_list = isinstance(known[name], tuple) and isinstance(value, list)
            set_field(config, name, tuple(value) if is_list else value)
        config.config_file = self.config_file
        return config

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the file."""
        saved = {name: value for name, value in self.settings.items() if name not in _NOT_SAVED}
        content = {_VERSION: VERSION, **_with_absolute_paths(saved)}
        if self.config_file:
            content[_CONFIG_FILE] = dataclasses.asdict(self.config_file)
        return content | ({_SOURCE: self.source} if self.source else {})

    def holds(self, name: str, value: Any) -> bool:
        """Returns whether the run has this value of a setting."""
        return _with_absolute_paths({name: self.settings.get(name)}) == _with_absolute_paths(
            {name: value}
        )

    def differences(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """Returns the saved and the given value of each setting that differs, by dotted name."""
        # A setting that is newer than the run had its default.
        saved = _with_absolute_paths(plain(Config()) | self.settings)
        given = _with_absolute_paths(plain(config))
        return {name: (saved[name], given[name]) for name in given if saved[name] != given[name]}


def is_identity(name: str, config: Config) -> bool:
    """Returns whether another value of this setting makes another run."""
    # A schedule spans all epochs, so another number of them makes another run.
    is_length = name == "fit.epochs" and config.optimizer.schedule != "constant"
    is_other = name in LOCATIONS or name in _DESCRIPTIONS
    return is_length or (name.startswith(_IDENTITY_PREFIXES) and not is_other)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        # Some editors put a byte-order mark in front.
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        raise _corrupt(path) from None
    if not isinstance(values, dict):
        raise _corrupt(path)
    return values


def _corrupt(path: Path) -> UserError:
    return UserError(f"{path} is corrupt: choose another --workdir")


def _with_absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with relative paths made absolute; those below a `~` are kept."""

    def complete(name: str, value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        if name in _LISTS_OF_PATHS:
            return ",".join(complete(_PATHS[0], folder) for folder in folders(value))
        is_word = value in _WORDS.get(name, ())
        is_relative = name in _PATHS and not value.startswith("~") and not is_word
        return os.path.abspath(value) if is_relative else value

    return {name: complete(name, value) for name, value in values.items()}
