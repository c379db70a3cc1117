"""Imports Matplotlib independently of the settings of the user."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from histo_jax.errors import UserError, one_line


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Hides MPLBACKEND and the log of Matplotlib while it is imported.

    Notebooks set MPLBACKEND for every program that they start; the import fails if that backend is
    not installed. After the import, the backend is set if Matplotlib knows it.

    Raises:
        UserError: a matplotlibrc cannot be decoded.
    """
    is_first = "matplotlib" not in sys.modules
    logger, silent = logging.getLogger("matplotlib"), logging.Filter("nothing")
    logger.addFilter(silent)
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"Matplotlib cannot read its settings ({one_line(error)}): fix the matplotlibrc in "
            "this folder, in MATPLOTLIBRC or in ~/.config/matplotlib"
        ) from None
    finally:
        logger.removeFilter(silent)
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend and is_first:
        with contextlib.suppress(ValueError):
            sys.modules["matplotlib"].rcParams["backend"] = backend
