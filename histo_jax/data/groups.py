"""Slides and patients: the names by which patches belong together.

Patches of one slide resemble each other, and so do slides of one patient: neither may be in
training and in evaluation.
"""

import functools
import logging

import numpy as np
import pandas as pd
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from histo_jax.data.names import clean, identity

log = logging.getLogger("histo_jax")

# The larger unit first: a slide is of one patient.
UNITS = ("patient", "slide")


def names(table: pd.DataFrame, unit: str) -> pd.Series:
    """Returns for each patch the name of its 'patient' or 'slide'; '' = not known."""
    return table[unit] if unit in table else pd.Series("", table.index, str)


def is_named(table: pd.DataFrame, unit: str) -> bool:
    """Whether any patch names its 'patient' or 'slide'."""
    return bool((names(table, unit) != "").any())


def has_names(table: pd.DataFrame, unit: str) -> bool:
    """Whether most patches share the name of their 'patient' or 'slide' with another patch.

    If not, the column holds another identifier, and dividing by it separates nothing.
    """
    known = names(table, unit)
    counts = known[known != ""].value_counts()
    return bool((counts == 1).sum() <= counts.sum() / 2)


def are_known(table: pd.DataFrame, unit: str) -> bool:
    """Whether all patches name their 'patient' or 'slide', and the names are not of patches."""
    return bool((names(table, unit) != "").all()) and has_names(table, unit)


def identities(table: pd.DataFrame, unit: str) -> pd.Series:
    """Returns for each patch the `identity` of the name, equal for all spellings."""
    column = names(table, unit)
    return column.map({name: identity(name) for name in column.unique()})


def connect(table: pd.DataFrame) -> Int[np.ndarray, " n"]:
    """Returns a number for each patch, equal where patches share a patient or a slide.

    That holds also through other patches: all patients of one slide have one number, and all
    slides of these patients. -1 = neither is known.
    """
    codes = [identities(table, unit) for unit in UNITS]
    patients, slides = (pd.factorize(column.where(column != ""))[0] for column in codes)
    slides[slides >= 0] += patients.max(initial=-1) + 1
    nodes = max(patients.max(initial=-1), slides.max(initial=-1)) + 1
    both = (patients >= 0) & (slides >= 0)
    links = coo_array((np.ones(both.sum()), (patients[both], slides[both])), (nodes, nodes))
    number = np.append(connected_components(links, directed=False)[1], -1)
    return number[np.where(patients >= 0, patients, slides)].astype(np.int64)


def unify(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Returns the tables with one spelling of each slide and patient in all of them, the first one.

    A patch that does not name its patient gets the one whom all other patches of its slide name.

    Args:
        tables: each with a column `slide`, some with `patient`; '' and the words of
            `names.UNKNOWN` = not known.
    """
    tables = _spell(tables, "slide")
    if any(is_named(table, "patient") for table in tables.values()):
        tables = _complete_patients(_spell(tables, "patient"))
    return tables


def _spell(tables: dict[str, pd.DataFrame], unit: str) -> dict[str, pd.DataFrame]:
    """Returns the tables with one spelling of each name in a column."""
    first: dict[str, str] = {}
    spellings: dict[str, set[str]] = {}
    for table in tables.values():
        for name in names(table, unit).unique():
            key = identity(name)
            first.setdefault(key, clean(name))
            spellings.setdefault(key, set()).add(name)
    several = [key for key, written in spellings.items() if key and len(written) > 1]
    if several:
        examples = ", ".join(map(repr, sorted(spellings[several[0]])[:3]))
        _warn_once(
            f"{len(several)} {unit}s have several spellings, such as {examples}; each counts as "
            f"one {unit}"
        )
    renamed = {name: first[key] for key, written in spellings.items() for name in written}
    return {
        split: table.assign(**{unit: names(table, unit).map(renamed)})
        for split, table in tables.items()
    }


def _complete_patients(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    columns = pd.concat([table[["slide", "patient"]] for table in tables.values()])
    pairs = columns[(columns != "").all(axis=1)].drop_duplicates()
    is_shared = pairs["slide"].duplicated(keep=False)
    if is_shared.any():
        shared = pairs["slide"][is_shared]
        _warn_once(
            f"{shared.nunique()} slides have patches of several patients, such as "
            f"{shared.iloc[0]!r}; these patients are kept together"
        )
    only = pairs[~is_shared].set_index("slide")["patient"]
    return {
        split: table.assign(
            patient=table["patient"].where(
                table["patient"] != "", table["slide"].map(only).fillna("")
            )
        )
        for split, table in tables.items()
    }


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
