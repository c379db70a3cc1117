import itertools

import pytest

from histo_jax.data import names

ONE_SLIDE = {
    "case": ["Slide_01", "slide_01", "SLIDE_01"],
    "spaces": ["slide 1", " slide  1 ", "slide\u00a01", "slide\t1", "\u200bslide 1\ufeff"],
    "unicode": ["M\u00fcller", "Mu\u0308ller", "\uff2d\u00fcller", "M\u200bu\u200c\u0308ller"],
    "dashes": ["a-b", "a\u2013b", "a\u2010b", "a\u2014b"],
    "numbers": ["7", "07", "7.0", "007.00", "\uff17"],
    "not-known": ["", " ", "nan", "NaN", "NA", "n/a", "None", "NULL", "-", "?", "Unknown", "<NA>"],
}


@pytest.mark.parametrize("kind", ONE_SLIDE)
def test_spellings_of_one_slide(kind):
    assert len({names.identity(name) for name in ONE_SLIDE[kind]}) == 1


def test_other_slides_are_kept_apart():
    apart = [
        "slide_1",
        "slide_01",
        "slide 1",
        "7",
        "70",
        "7.1",
        "0",
        "nano",
        "a-b",
        "ab",
        "unknown_1",
    ]
    assert len({names.identity(name) for name in apart}) == len(apart)


@pytest.mark.parametrize("name", ["Slide_01", "TCGA-A1 (left)", "10", "7.0", "M\u00fcller"])
def test_ordinary_names_stay_as_they_are(name):
    assert names.clean(name) == name


def test_cleaning_twice_changes_nothing():
    for name in itertools.chain(*ONE_SLIDE.values()):
        assert names.clean(names.clean(name)) == names.clean(name)
    assert {names.clean(name) for name in ONE_SLIDE["not-known"]} == {""}
