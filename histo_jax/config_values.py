"""Values of settings: lists, folders and folds as text, and the limits of a field."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# `pathlib` turns the two slashes of a URL into one. `user@host:/` is scp's.
_URL = re.compile(
    r"[a-z][a-z0-9+.-]+://|[^/]+@[^/]+:/|"
    r"(abfss?|adl|az|dbfs|file|ftps?|gcs|gs|hdfs|hf|https?|memory|oss|s3[an]?|sftp|ssh|wasbs?):/",
    re.IGNORECASE,
)
NO_URL = "a folder, not a URL: mount the bucket or copy it, and give the path"


def names(text: str) -> list[str]:
    """Returns the names in a list that is separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def folders(text: str) -> list[str]:
    """Returns the folders in a list that is separated by commas.

    The name of an existing folder may contain commas: where a text can be read in several ways,
    the longest existing name wins, and a slash at the end of a name (`a/,b`) ends it.
    """
    pieces, result = text.split(","), []
    while pieces:
        for count in range(len(pieces), 0, -1):
            name = ",".join(pieces[:count])
            # Blanks around a name belong to it only where there is such a folder.
            name = name if _is_folder(name) else name.strip()
            if count == 1 or _is_folder(name):
                break
        result.append(name)
        pieces = pieces[count:]
    return [name for name in result if name]


def _is_folder(name: str) -> bool:
    try:
        return bool(name.strip()) and Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, no such home, not a path
        return False


def is_url(path: str) -> bool:
    """Returns whether `path` is the address of a bucket or a server, not a local path."""
    return bool(_URL.match(path.strip()))


def parse_fold(fold: str) -> tuple[int, int]:
    """Returns K and N of 'K/N'.

    Raises:
        ValueError: it is not of this form, or K is not from 1 to N, or N is below 2.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", fold, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]) or int(match[2]) < 2:
        raise ValueError(fold)
    return int(match[1]), int(match[2])


class Limit(NamedTuple):
    """What a value must be.

    Attributes:
        holds: whether a value is within the limit; None is never checked.
        expected: the limit in words, after 'must be'.
    """

    holds: Callable[[Any], bool]
    expected: str


def at_least(minimum: int, otherwise: str = "") -> Limit:
    """Returns the limit of a count; `otherwise` says what None means."""
    return Limit(lambda value: value >= minimum, f"at least {minimum}{otherwise}")


def is_fold(fold: str) -> bool:
    """Returns whether `parse_fold` accepts a text."""
    try:
        return bool(parse_fold(fold))
    except ValueError:
        return False


def is_json(value: Any) -> bool:
    """Returns whether a value is made of dicts, lists, text, finite numbers, booleans and None."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_json, value))
    is_number = isinstance(value, float) and math.isfinite(value)
    return is_number or value is None or isinstance(value, bool | int | str)


FRACTION = Limit(lambda value: 0 < value < 1, "above 0 and below 1")
BELOW_ONE = Limit(lambda value: 0 <= value < 1, "at least 0 and below 1")
NOT_NEGATIVE = Limit(lambda value: 0 <= value < math.inf, "at least 0 and finite")
POSITIVE = Limit(lambda value: 0 < value < math.inf, "above 0 and finite")
LOCAL_PATH = Limit(lambda value: not is_url(value), NO_URL)
LOCAL_PATHS = Limit(lambda value: not any(map(is_url, names(value))), NO_URL)
