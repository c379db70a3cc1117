"""The optional libraries of the server."""

import importlib

from histo_jax.errors import UserError, one_line

_REQUIRED = ("starlette", "uvicorn", "python_multipart", "prometheus_client")


def check() -> None:
    """Imports all of them, so that a missing one is reported before any work.

    Raises:
        UserError: one is not installed, or cannot be loaded; names the fix.
    """
    for name in _REQUIRED:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:
            raise UserError(
                f"the server needs the extra 'serve' ({one_line(error)}): run "
                "launch/install.sh serve, or pip install 'histo_jax[serve]'"
            ) from None
