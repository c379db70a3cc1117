import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from histo_jax.data import groups

NAMES = st.sampled_from(["", "a", "A ", "b", "c", "7", "07"])


def make(patients, slides):
    return pd.DataFrame({"patient": patients, "slide": slides}, dtype=str)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NAMES, NAMES), max_size=12))
def test_patches_are_connected_as_by_a_search(pairs):
    table = make([p for p, _ in pairs], [s for _, s in pairs])
    numbers = groups.connect(table)
    names = [groups.identities(table, unit).to_numpy() for unit in groups.UNITS]
    linked = np.eye(len(pairs), dtype=bool)
    for own in names:
        linked |= (own[:, None] == own) & (own != "")[:, None] & (own != "")
    for _ in pairs:
        linked = (linked.astype(int) @ linked) > 0
    is_named = (names[0] != "") | (names[1] != "")
    assert ((numbers >= 0) == is_named).all()
    same = numbers[:, None] == numbers
    assert (same == linked)[np.ix_(is_named, is_named)].all()


def test_a_patch_gets_the_patient_of_its_slide_unless_the_slide_has_several(log):
    tables = groups.unify(
        {
            "train": make(["P1", "", "P2", "P3", ""], ["s1", "S1", "s2", "s2", "s2"]),
            "test": pd.DataFrame({"slide": ["s1", "s4"]}),
        }
    )
    assert tables["train"]["patient"].tolist() == ["P1", "P1", "P2", "P3", ""]
    assert tables["test"]["patient"].tolist() == ["P1", ""]
    assert "1 slides have patches of several patients, such as 's2'" in log.text


def test_spellings_of_a_patient_are_one_and_tables_without_patients_get_no_column():
    unified = groups.unify({"train": make(["p 1", "P 1 ", "unknown"], ["a", "b", "c"])})["train"]
    assert unified["patient"].tolist() == ["p 1", "p 1", ""]
    assert list(groups.unify({"train": pd.DataFrame({"slide": ["a"]})})["train"]) == ["slide"]
