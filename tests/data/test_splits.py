import logging

import numpy as np
import pandas as pd
import pytest

from histo_jax.config import Config
from histo_jax.data import splits
from histo_jax.data.builder import SQUARES, SUMS
from histo_jax.errors import ExpectedError


def make_table(count: int = 400, slides: int = 0, positive: float = 0.4) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "id": [f"{i:040x}" for i in range(count)],
            "label": (rng.random(count) < positive).astype(int),
            "slide": [f"s{i}" for i in rng.integers(0, slides, count)] if slides else "",
        }
    )


def test_sides_are_disjoint_stratified_and_repeatable():
    table, config = make_table(), Config()
    config.data.validation_fraction = 0.25
    split = splits.make_split(table, config)
    again = splits.make_split(table, config)
    assert split.by == "image"
    assert sorted([*split.train, *split.validation]) == list(range(400))
    assert len(split.validation) == 100
    share = table["label"].mean()
    assert abs(table["label"].iloc[split.validation].mean() - share) < 0.01
    np.testing.assert_array_equal(split.validation, again.validation)
    config.seed = 1
    assert set(splits.make_split(table, config).validation) != set(split.validation)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.4])
def test_no_slide_is_on_both_sides(fraction):
    table, config = make_table(count=2000, slides=30), Config()
    config.data.validation_fraction = fraction
    split = splits.make_split(table, config)
    slides = table["slide"].to_numpy()
    assert split.by == "slide"
    assert not set(slides[split.train]) & set(slides[split.validation])
    assert len(split.train) + len(split.validation) == 2000
    assert abs(len(split.validation) / 2000 - fraction) < 0.05


def test_image_split_of_known_slides_only_when_asked():
    table, config = make_table(slides=30), Config()
    config.data.split_by = "image"
    split = splits.make_split(table, config)
    slides = table["slide"].to_numpy()
    assert split.by == "image"
    assert set(slides[split.train]) & set(slides[split.validation])


def test_slide_split_without_slides_is_refused():
    config = Config()
    config.data.split_by = "slide"
    with pytest.raises(ExpectedError, match="split_by"):
        splits.make_split(make_table(), config)


def test_a_single_slide_cannot_be_divided():
    with pytest.raises(ExpectedError, match="split_by=image"):
        splits.make_split(make_table(slides=1), Config())


def test_sampling_balances_the_classes():
    table, config = make_table(), Config()
    config.data.samples_per_class = 50
    split = splits.make_split(table, config)
    rows = np.concatenate([split.train, split.validation])
    assert np.bincount(table["label"].iloc[rows]).tolist() == [50, 50]


def test_a_class_with_too_few_is_taken_whole_and_said(caplog):
    table, config = make_table(positive=0.2), Config()
    positives = int(table["label"].sum())
    config.data.samples_per_class = positives + 20
    logging.getLogger("histo_jax").addHandler(caplog.handler)
    split = splits.make_split(table, config)
    logging.getLogger("histo_jax").removeHandler(caplog.handler)
    rows = np.concatenate([split.train, split.validation])
    assert np.bincount(table["label"].iloc[rows]).tolist() == [positives + 20, positives]
    assert f"class 1 has {positives} patches" in caplog.text


def test_normalisation_equals_the_pixels_own_moments():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    flat = images.reshape(5, -1, 3).astype(np.int64)
    table = pd.DataFrame(flat.sum(1), columns=list(SUMS))
    table[list(SQUARES)] = (flat**2).sum(1)
    mean, deviation = splits.normalisation(table, np.array([0, 2, 4]))
    chosen = images[[0, 2, 4]] / 255
    np.testing.assert_allclose(mean, chosen.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, chosen.std((0, 1, 2)), rtol=1e-6)
    assert mean.dtype == deviation.dtype == np.float32


def test_fingerprint_tells_seed_batch_size_and_examples_apart():
    table, config = make_table(), Config()
    split = splits.make_split(table, config)
    prints = {splits.fingerprint(table, split, config)}
    assert splits.fingerprint(table.copy(), split, config) in prints
    for change in ("seed", "batch", "ids", "side"):
        other, changed, divided = table.copy(), Config(), split
        if change == "seed":
            changed.seed = 1
        elif change == "batch":
            changed.fit.batch_size = 32
        elif change == "ids":
            other.loc[split.train[0], "id"] = "f" * 40
        else:
            divided = splits.Split(split.train[1:], split.validation, split.by)
        prints.add(splits.fingerprint(other, divided, changed))
    assert len(prints) == 5
