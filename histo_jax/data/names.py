"""Names of slides as people write them: which are one name, and which are none."""

import re
import unicodedata

import pandas as pd

# What tables hold where a name is not known; no slide is called so.
UNKNOWN = {
    "", "-", "--", "?", "n/a", "na", "nan", "nat", "<na>", "#n/a", "none", "null", "nil",
    "unknown", "not known", "undefined", "missing",
}  # fmt: skip
_NUMBER = re.compile(r"0*(\d+)(\.0+)?")


def clean(name: str) -> str:
    """Returns a name without invisible characters and needless spaces; '' = not known."""
    visible = "".join(c for c in name if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc"))
    name = " ".join(unicodedata.normalize("NFKC", visible).split())
    return "" if name.casefold() in UNKNOWN else name


def clean_column(names: pd.Series) -> pd.Series:
    """Returns a column with each name as `clean` gives it."""
    return names.map({name: clean(name) for name in names.unique()})


def identity(name: str) -> str:
    """Returns what all spellings of one slide have in common.

    Case, the kind of dash, and how a table wrote a number (7, 07, 7.0) tell no slides apart: taking
    two slides for one costs little, and one slide for two lets it train and be scored.
    """
    name = unicodedata.normalize("NFKC", clean(name).casefold())
    name = "".join("-" if unicodedata.category(c) == "Pd" else c for c in name)
    number = _NUMBER.fullmatch(name)
    return number[1] if number else name
