"""The optional libraries that read and write slides."""

from typing import Any

from histo_jax import extras

REQUIRED = ("openslide", "tifffile", "shapely")


def load(name: str) -> Any:
    """Returns a module of the extra `slides`.

    Raises:
        UserError: it is not installed, or cannot be loaded; names the fix.
    """
    return extras.load(name, "slides", "whole slides need")


def check() -> None:
    """Imports all of them, so that a missing one is reported before any work.

    Raises:
        UserError: see `load`.
    """
    for name in REQUIRED:
        load(name)
