"""The optional libraries that read and write slides."""

import importlib
from typing import Any

from histo_jax.errors import UserError, one_line

REQUIRED = ("openslide", "tifffile", "shapely")


def load(name: str) -> Any:
    """Returns a module of the extra `slides`.

    Raises:
        UserError: it is not installed, or cannot be loaded; names the fix.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise UserError(
            f"whole slides need the extra 'slides' ({one_line(error)}): run "
            "launch/install.sh slides, or pip install 'histo_jax[slides]'"
        ) from None


def check() -> None:
    """Imports all of them, so that a missing one is reported before any work.

    Raises:
        UserError: see `load`.
    """
    for name in REQUIRED:
        load(name)
