"""Processes that differ are refused; `test_processes.py` has real processes."""

import copy

import numpy as np
import pandas as pd
import pytest

from histo_jax.config import Config
from histo_jax.distributed import consensus
from histo_jax.errors import UserError

TABLES = {"train": pd.DataFrame({"id": ["a", "b"], "label": [0, 1], "slide": ["s", "t"]})}


@pytest.fixture
def both(monkeypatch):
    """Runs a function as each of two processes, and then again with the values of both."""

    def run(first, second):
        gathered = [[], []]
        for own, function in zip(gathered, (first, second), strict=True):

            def gather(values, own=own):
                own.append(values)
                return np.stack([values, values])

            monkeypatch.setattr(consensus, "_gather", gather)
            function()
        gathered_values = iter(zip(*gathered, strict=True))
        monkeypatch.setattr(consensus, "_gather", lambda _: np.stack(next(gathered_values)))
        first()

    monkeypatch.setattr(consensus.jax, "process_count", lambda: 2)
    return run


def test_alike_is_what_has_the_same_records_and_settings(both):
    other = Config()
    other.data.tfds_dir, other.data.placement = "elsewhere", "disk"
    both(
        lambda: consensus.check_records(Config(), TABLES),
        lambda: consensus.check_records(other, dict(reversed(TABLES.items()))),
    )
    both(
        lambda: consensus.check_options(Config(), "fit"),
        lambda: consensus.check_options(other, "fit"),
    )


@pytest.mark.parametrize("change", ["label", "id", "slide", "split"])
def test_other_records_are_refused(both, change):
    tables = copy.deepcopy(TABLES)
    if change == "split":
        tables = {"test": tables["train"]}
    else:
        tables["train"][change] = tables["train"][change].to_numpy()[::-1]
    with pytest.raises(
        UserError, match=r"^process 1 and process 0 have different records in .*: copy"
    ):
        both(
            lambda: consensus.check_records(Config(), TABLES),
            lambda: consensus.check_records(Config(), tables),
        )


@pytest.mark.parametrize(("seed", "mode"), [(1, "fit"), (0, "predict")])
def test_other_options_are_refused(both, seed, mode):
    with pytest.raises(UserError, match=r"^process 1 and process 0 have different options: start"):
        both(
            lambda: consensus.check_options(Config(), "fit"),
            lambda: consensus.check_options(Config(seed=seed), mode),
        )


@pytest.mark.parametrize("index", [0, 1])
def test_a_folder_that_another_process_does_not_see_is_refused_by_all(index, monkeypatch, tmp_path):
    visible = []

    def gather(values):
        if values.dtype != bool:
            return values[None]  # the mark's name
        visible.append(values[0])
        return np.array([[True], [False]])

    monkeypatch.setattr(consensus.jax, "process_count", lambda: 2)
    monkeypatch.setattr(consensus.jax, "process_index", lambda: index)
    monkeypatch.setattr(consensus, "_VISIBLE_SECONDS", 0)
    monkeypatch.setattr(consensus, "_gather", gather)
    with pytest.raises(UserError, match=r"^--workdir=.* of process 1 is not .* share$"):
        consensus.check_shared_folder(tmp_path)
    # The first process makes a file there, which the other does not find; the file is removed.
    assert visible == [index == 0]
    assert not any(tmp_path.iterdir())


def test_the_least_of_all_counts_and_the_first_decides(both):
    found = []
    both(
        lambda: found.append(
            (
                consensus.global_minimum(7),
                consensus.broadcast_from_primary(np.array([0.1])).tolist(),
            )
        ),
        lambda: found.append(
            (
                consensus.global_minimum(5),
                consensus.broadcast_from_primary(np.array([0.2])).tolist(),
            )
        ),
    )
    assert found[-1] == (5, [0.1])
    both(
        lambda: found.append(consensus.global_minimum(7)),
        lambda: found.append(consensus.global_minimum(None)),
    )
    assert found[-1] is None
