"""Imports Matplotlib whatever the user's settings are."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from unittest import mock

from histo_jax.errors import UserError, one_line


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Hides MPLBACKEND while Matplotlib is imported, and what that logs of settings and folders.

    Notebooks hand MPLBACKEND to every program that they start, and without that backend in its
    environment the import fails.

    Raises:
        UserError: a matplotlibrc cannot be decoded.
    """
    is_first = "matplotlib" not in sys.modules
    logger, silent = logging.getLogger("matplotlib"), logging.Filter("nothing")
    logger.addFilter(silent)
    try:
        with mock.patch.dict(os.environ):
            backend = os.environ.pop("MPLBACKEND", None)
            yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"Matplotlib cannot read its settings ({one_line(error)}): correct the matplotlibrc in "
            "this folder, in MATPLOTLIBRC or in ~/.config/matplotlib"
        ) from None
    finally:
        logger.removeFilter(silent)
    if backend and is_first:
        with contextlib.suppress(ValueError):  # the user's own figures are drawn with it
            sys.modules["matplotlib"].rcParams["backend"] = backend
