import itertools

import grain
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


def test_each_pass_has_every_row_at_most_once_in_a_new_order():
    rows = np.arange(50)
    order = loader.training_order(50, 8, seed=3)
    passes = [np.concatenate([order[p * 6 + k] for k in range(6)]) for p in range(3)]
    for one in passes:
        assert len(set(one.tolist())) == 48
        assert set(one.tolist()) <= set(rows.tolist())
    assert passes[0].tolist() != passes[1].tolist() != passes[2].tolist()
    left_out = [set(rows.tolist()) - set(one.tolist()) for one in passes]
    assert left_out[0] != left_out[1]


def test_order_is_a_function_of_seed_and_step():
    one, same, other = (loader.training_order(50, 8, seed) for seed in (3, 3, 4))
    assert all((one[k] == same[k]).all() for k in (0, 5, 6, 1000))
    assert any((one[k] != other[k]).any() for k in range(6))


def test_the_order_of_saved_runs_does_not_change():
    order = loader.training_order(50, 8, seed=3)
    assert order[0].tolist() == [29, 30, 31, 7, 26, 3, 47, 19]
    assert order[6].tolist() == [36, 24, 41, 49, 26, 10, 40, 4]  # the second pass


@pytest.mark.parametrize(("count", "size", "seed"), [(50, 8, 0), (64, 8, 2**31 - 1), (9, 9, 3)])
def test_order_is_that_of_grains_own_shuffle(count, size, seed):
    order = loader.training_order(count, size, seed)
    plain = grain.MapDataset.range(count).seed(seed).shuffle()
    plain = plain.batch(size, drop_remainder=True).repeat()
    for step in (0, 1, 5, 6, 7, 1000, 10**9):
        assert order[step].tolist() == plain[step].tolist()


@pytest.mark.parametrize("first", [0, 5, 13])
def test_prefetching_starts_anywhere_and_is_bounded(first):
    source = Records(50)
    records = loader.Records(source, np.arange(50), np.zeros(50, np.float32))
    order = loader.training_order(50, 8, seed=3)
    batches = loader.prefetch(order, records.images, first)
    for step in range(first, first + 9):
        np.testing.assert_array_equal(next(batches)[:, 0, 0, 0], order[step])
    assert len(source.read) <= (9 + loader._PREFETCH.prefetch_buffer_size) * 8


def test_ordered_batches_have_each_row_once_and_mask_the_padding():
    source, rows = Records(50), np.array([7, 3, 9, 1, 20, 30, 49])
    batches = list(loader.ordered_batches(source, rows, 4))
    assert [b["image"].shape for b in batches] == [(4, 96, 96, 3)] * 2
    kept = itertools.chain.from_iterable(b["image"][b["mask"]][:, 0, 0, 0] for b in batches)
    assert list(kept) == rows.tolist()
    assert batches[-1]["mask"].tolist() == [True, True, True, False]
