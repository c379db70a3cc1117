"""The configs that come with the package, by name: `configs/` of a clone, its copy in a wheel."""

import difflib
import runpy
from pathlib import Path

from histo_jax.config import Config
from histo_jax.errors import UserError

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
    """Returns the config of a recipe, to be changed as you like.

    Raises:
        UserError: there is no such recipe; its message names those that exist.
    """
    file = path(name)
    if file is None:
        near = difflib.get_close_matches(name, names(), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no recipe is called {name!r}; {meant}there are {', '.join(names())}")
    config: Config = runpy.run_path(str(file))["get_config"]()
    return config


def _folder() -> Path:
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"
