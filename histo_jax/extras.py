"""Optional libraries, which extras of the package install."""

import importlib
from typing import Any

from histo_jax.errors import UserError, one_line


def load(name: str, extra: str, user: str) -> Any:
    """Returns a module of an extra.

    Args:
        name: of the module.
        extra: name of the extra.
        user: what needs it, for the message, as 'the server needs'.

    Raises:
        UserError: the module is not installed, or cannot be loaded; names the fix.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise UserError(
            f"{user} the extra {extra!r} ({one_line(error)}): run launch/install.sh {extra}, or "
            f"pip install 'histo_jax[{extra}]'"
        ) from None
