import itertools

import numpy as np
import pytest

from histo_jax.data import loader


class Records:
    """Record i is an image of the value i with label i % 2."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read: list[int] = []

    def __getitems__(self, rows):
        self.read += rows
        return [{"image": np.full((96, 96, 3), r, np.uint8), "label": r % 2} for r in rows]


def test_each_pass_takes_every_row_at_most_once_and_shuffles_anew():
    rows = np.arange(100, 150)
    order = loader.training_order(rows, 8, seed=3)
    passes = [np.concatenate([order[p * 6 + k] for k in range(6)]) for p in range(3)]
    for one in passes:
        assert len(set(one.tolist())) == 48
        assert set(one.tolist()) <= set(rows.tolist())
    assert passes[0].tolist() != passes[1].tolist() != passes[2].tolist()
    left_out = [set(rows.tolist()) - set(one.tolist()) for one in passes]
    assert left_out[0] != left_out[1]


def test_order_is_a_function_of_seed_and_step():
    rows = np.arange(50)
    one, same, other = (loader.training_order(rows, 8, seed) for seed in (3, 3, 4))
    assert all((one[k] == same[k]).all() for k in (0, 5, 6, 1000))
    assert any((one[k] != other[k]).any() for k in range(6))


@pytest.mark.parametrize("first_step", [0, 5, 13])
def test_batches_start_at_any_step(first_step):
    source, rows = Records(50), np.arange(50)
    order = loader.training_order(rows, 8, seed=3)
    batches = loader.training_batches(source, rows, 8, 3, first_step)
    for step, batch in zip(range(first_step, first_step + 9), batches, strict=False):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], order[step])
        np.testing.assert_array_equal(batch["label"], order[step] % 2)
        assert batch["mask"].all()


def test_ordered_batches_give_each_row_once_and_mask_the_filling():
    source, rows = Records(50), np.array([7, 3, 9, 1, 20, 30, 49])
    batches = list(loader.ordered_batches(source, rows, 4))
    assert [b["image"].shape for b in batches] == [(4, 96, 96, 3)] * 2
    kept = itertools.chain.from_iterable(b["image"][b["mask"]][:, 0, 0, 0] for b in batches)
    assert list(kept) == rows.tolist()
    assert batches[-1]["mask"].tolist() == [True, True, True, False]
