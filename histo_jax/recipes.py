"""The configs that come with the package, by name: `configs/` of a clone, its copy in a wheel."""

import runpy
from pathlib import Path

from histo_jax.config import Config, ConfigFile
from histo_jax.errors import ConfigError, did_you_mean

_PACKAGE = Path(__file__).parent


def names() -> list[str]:
    """Returns the names of all recipes, sorted."""
    return sorted(file.stem for file in _folder().glob("*.py"))


def path(name: str) -> Path | None:
    """Returns the config file of a recipe, None if there is none.

    Args:
        name: as in `pcam_best`; `pcam_best.py` and `configs/pcam_best.py` are the same.
    """
    short = name.removeprefix("configs/").removesuffix(".py")
    return _folder() / f"{short}.py" if short in names() else None


def recipe(name: str) -> Config:
    """Returns the config of a recipe, as a start for your own.

    Raises:
        ConfigError: there is no such recipe; the message names those that exist.
    """
    file = path(name)
    if file is None:
        hint = did_you_mean(name, names())
        raise ConfigError(f"unknown recipe {name!r}: choose from {', '.join(names())}{hint}")
    config: Config = runpy.run_path(str(file))["get_config"]()
    config.config_file = ConfigFile(str(file), name)
    return config


def _folder() -> Path:
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"
