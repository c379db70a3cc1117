"""Names of slides as people write them: spellings of one name, and words for 'not known'."""

import re
import unicodedata

import pandas as pd

# Cells of tables in which the name is not known.
UNKNOWN = {
    "", "-", "--", "?", "n/a", "na", "nan", "nat", "<na>", "#n/a", "none", "null", "nil",
    "unknown", "not known", "undefined", "missing",
}  # fmt: skip
_NUMBER = re.compile(r"0*(\d+)(\.0+)?")


def clean(name: str) -> str:
    """Returns a name without invisible characters and superfluous spaces; '' = not known."""
    visible = "".join(c for c in name if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc"))
    name = " ".join(unicodedata.normalize("NFKC", visible).split())
    return "" if name.casefold() in UNKNOWN else name


def clean_column(names: pd.Series) -> pd.Series:
    """Applies `clean` to each name of a column."""
    return names.map({name: clean(name) for name in names.unique()})


def identity(name: str) -> str:
    """Returns a normalised name that is equal for all spellings of one slide.

    Case, the kind of dash, and the format of a number (7, 07, 7.0) do not distinguish slides:
    to merge two slides costs little, but to split one lets it be in training and evaluation.
    """
    name = unicodedata.normalize("NFKC", clean(name).casefold())
    name = "".join("-" if unicodedata.category(c) == "Pd" else c for c in name)
    number = _NUMBER.fullmatch(name)
    return number[1] if number else name
