"""Addresses, names and the token by which clients reach the server."""

import ipaddress
from collections.abc import Collection
from pathlib import Path

from histo_jax.errors import ConfigError

HOW = "python -c 'import secrets; print(secrets.token_urlsafe())'"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_SHORTEST_TOKEN = 16


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def without_brackets(host: str) -> str:
    """Returns an address without the brackets that URLs have around one of IPv6."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def allowed_hosts(host: str, others: Collection[str]) -> frozenset[str]:
    """Returns what a Host header may name, without a port.

    Args:
        host: address that the server listens on.
        others: more names of this machine.

    Raises:
        ConfigError: a name is not one, but a URL or has a port.
    """
    names = [without_brackets(name) for name in (host, *others)]
    for name in names[1:]:
        if "/" in name or name.count(":") == 1:
            raise ConfigError(
                f"--allow-hosts={name} must be a name or an address, without http:// and a port"
            )
    named = [f"[{name}]" if ":" in name else name for name in names]
    return frozenset(name.lower() for name in (*_LOOPBACK, *named))


def read_token(path: Path) -> str:
    """Returns the token that a file holds.

    Raises:
        ConfigError: the file cannot be read, or does not hold one long word of ASCII.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not ASCII text"
        raise ConfigError(
            f"--token-file={path} cannot be read ({reason}): make it by {HOW}"
        ) from None
    if len(token) < _SHORTEST_TOKEN or len(token.split()) != 1:
        raise ConfigError(
            f"--token-file={path} must hold one word of at least {_SHORTEST_TOKEN} characters: "
            f"make it by {HOW}"
        )
    return token
