"""The optional libraries of the server."""

from histo_jax import extras

_REQUIRED = ("starlette", "uvicorn", "python_multipart", "prometheus_client")


def check() -> None:
    """Imports all of them, so that a missing one is reported before any work.

    Raises:
        UserError: one is not installed, or cannot be loaded; names the fix.
    """
    for name in _REQUIRED:
        extras.load(name, "serve", "the server needs")
