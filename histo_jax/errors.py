"""Errors that a user can fix."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An expected failure; its message is one line that names the file or field and the fix.

    The command line prints the message without a traceback and exits with status 2.
    """


class ConfigError(UserError):
    """A setting is missing, unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """Raw data or records are missing, corrupt, or do not fit the settings."""


class CheckpointError(UserError):
    """A checkpoint is missing, corrupt, or belongs to another network or version."""


class ParityError(Exception):
    """An exported file does not compute what the predictor computes.

    Not a mistake of the user: the command line prints the message and exits with status 1.
    """


def one_line(error: BaseException) -> str:
    """Returns the message of a library's error as one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name that is closest to a misspelt one, None if none is close."""
    by_key = {choice.lower(): choice for choice in known}
    key = name.lower().replace("-", "_")
    matches = difflib.get_close_matches(key, by_key, n=1, cutoff=cutoff)
    return by_key[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message that suggests the closest known name, if one is close."""
    match = closest(name, known)
    return f"; did you mean {match}?" if match else ""
