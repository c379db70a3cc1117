"""Whether parts of the data share patients, slides or pixels, and what that means for scores."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from histo_jax.data import groups
from histo_jax.data.record_files import SQUARES, SUMS, pixel_hashes

# The whole table of a split, and the rows of a subset.
Part = tuple[pd.DataFrame, np.ndarray]

UNCHECKED = (
    "whether training and evaluation share slides was not checked: not all patches name their "
    "slide, or each names one of its own"
)
OPTIMISTIC = (
    "the score is optimistic: evaluated patches may be neighbours of training patches on the same "
    "slides"
)
OPTIMISTIC_PATIENTS = (
    "the score is optimistic: evaluated patches are of patients of whom other patches were trained "
    "on"
)


def caveat(slide_disjoint: bool | None, patient_disjoint: bool | None = None) -> str:
    """Returns the caveat that belongs beside a score; '' where there is none.

    Patients that are not known need none of their own: few data sets name them.
    """
    if slide_disjoint is False:
        return OPTIMISTIC
    if patient_disjoint is False:
        return OPTIMISTIC_PATIENTS
    return UNCHECKED if slide_disjoint is None else ""


def combine(disjoint: Iterable[bool | None]) -> bool | None:
    """Returns the value for all together: false if any is false, else None if any is None."""
    values = list(disjoint)
    return False if False in values else None if None in values else True


def disjoint(first: Part, second: Part) -> bool | None:
    """Returns whether two subsets share no slide and no pixels; None = not all slides are known.

    Args:
        first: the whole table of its split, and the rows of the subset.
        second: likewise.
    """
    subsets = [table.iloc[rows] for table, rows in (first, second)]
    if share(subsets[0], subsets[1]):
        return False
    are_known = all((subset["slide"] != "").all() for subset in subsets)
    are_names = all(groups.has_names(table, "slide") for table, _ in (first, second))
    # A slide is of one patient.
    return True if (are_known and are_names) or disjoint_patients(first, second) else None


def disjoint_patients(first: Part, second: Part) -> bool | None:
    """Returns whether two subsets share no patient; None = not all patients are known.

    Subsets that share a slide or pixels share its patient. For the arguments see `disjoint`.
    """
    subsets = [table.iloc[rows] for table, rows in (first, second)]
    if not all(groups.is_named(subset, "patient") for subset in subsets):
        return None
    if any(share(subsets[0], subsets[1], unit) for unit in groups.UNITS):
        return False
    are_known = all((subset["patient"] != "").all() for subset in subsets)
    are_names = all(groups.has_names(table, "patient") for table, _ in (first, second))
    return True if are_known and are_names else None


def share(first: pd.DataFrame, second: pd.DataFrame, unit: str = "slide") -> bool:
    """Returns whether two parts of tables share a slide, or pixels of more than one colour.

    Args:
        first: columns as in `splits.make_subsets`.
        second: likewise.
        unit: 'patient' compares patients instead of slides.
    """
    return bool(shared_names(first, second, unit)) or not shared_ids(first, second).empty


def shared_names(first: pd.DataFrame, second: pd.DataFrame, unit: str) -> set[str]:
    """Returns the `identity` of each slide or patient that two parts of tables share."""
    both = [set(groups.identities(table, unit)) for table in (first, second)]
    return set.intersection(*both) - {""}


def shared_ids(first: pd.DataFrame, second: pd.DataFrame) -> pd.Series:
    """Returns the ids of `first` whose pixels `second` has, too, except patches of one colour.

    Empty glass of two slides can be equal by chance. For the arguments see `share`.
    """
    shared = first[pixel_hashes(first).isin(pixel_hashes(second))]
    sums, squares = (shared[list(names)].to_numpy() for names in (SUMS, SQUARES))
    one_colour = (sums**2 == shared[["pixels"]].to_numpy() * squares).all(axis=1)
    return shared["id"][~one_colour]
