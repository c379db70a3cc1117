import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histo_jax.config import Config, DataConfig
from histo_jax.data import overlap, splits
from histo_jax.data.record_files import SQUARES, SUMS
from histo_jax.errors import UserError


def make_table(count: int = 400, slides: int = 0, positive: float = 0.4) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "id": [f"{i:040x}" for i in range(count)],
            "label": (rng.random(count) < positive).astype(int),
            "slide": [f"s{i}" for i in rng.integers(0, slides, count)] if slides else "",
            **dict.fromkeys(SUMS, 9216 * 200),
            **dict.fromkeys(SQUARES, 9216 * 200**2 + 1),
            "pixels": 9216,
        }
    )


def make_split(table: pd.DataFrame, config: Config) -> splits.Subsets:
    return splits.make_subsets({"train": table}, config.data, config.data_seed)


def test_subsets_are_disjoint_stratified_and_repeatable():
    table, config = make_table(), Config()
    config.data.validation_fraction = 0.25
    split = make_split(table, config)
    second = make_split(table, config)
    assert split.by == "image"
    assert sorted([*split.train.rows, *split.validation.rows]) == list(range(400))
    assert len(split.validation.rows) == 100
    share = table["label"].mean()
    assert abs(table["label"].iloc[split.validation.rows].mean() - share) < 0.01
    np.testing.assert_array_equal(split.validation.rows, second.validation.rows)
    config.seed = 1
    assert set(make_split(table, config).validation.rows) != set(split.validation.rows)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.4])
def test_no_slide_is_in_both_subsets(fraction):
    table, config = make_table(count=2000, slides=30), Config()
    config.data.validation_fraction = fraction
    split = make_split(table, config)
    slides = table["slide"].to_numpy()
    assert split.by == "slide"
    assert not set(slides[split.train.rows]) & set(slides[split.validation.rows])
    assert len(split.train.rows) + len(split.validation.rows) == 2000
    assert abs(len(split.validation.rows) / 2000 - fraction) < 0.05


def test_known_slides_are_split_by_image_only_on_request():
    table, config = make_table(slides=30), Config()
    config.data.split_by = "image"
    split = make_split(table, config)
    slides = table["slide"].to_numpy()
    assert split.by == "image"
    assert set(slides[split.train.rows]) & set(slides[split.validation.rows])


def test_slide_split_without_slides_is_refused():
    config = Config()
    config.data.split_by = "slide"
    with pytest.raises(UserError, match="split_by"):
        make_split(make_table(), config)


def test_a_single_slide_cannot_be_divided():
    with pytest.raises(UserError, match="split_by=image"):
        make_split(make_table(slides=1), Config())


def test_sampling_balances_the_classes():
    table, config = make_table(), Config()
    config.data.samples_per_class = 50
    split = make_split(table, config)
    rows = np.concatenate([split.train.rows, split.validation.rows])
    assert np.bincount(table["label"].iloc[rows]).tolist() == [50, 50]


def test_all_patches_of_a_class_with_too_few_are_used_with_a_warning(messages):
    table, config = make_table(positive=0.2), Config()
    positives = int(table["label"].sum())
    config.data.samples_per_class = positives + 20
    split = make_split(table, config)
    rows = np.concatenate([split.train.rows, split.validation.rows])
    assert np.bincount(table["label"].iloc[rows]).tolist() == [positives + 20, positives]
    assert f"class 1 has {positives} patches" in "\n".join(messages)


def test_channel_stats_equal_the_moments_of_the_pixels():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    flat = images.reshape(5, -1, 3).astype(np.int64)
    table = pd.DataFrame(flat.sum(1), columns=list(SUMS))
    table[list(SQUARES)] = (flat**2).sum(1)
    table["pixels"] = 96**2
    mean, std = splits.channel_stats(table, np.array([0, 2, 4]))
    chosen = images[[0, 2, 4]] / 255
    np.testing.assert_allclose(mean, chosen.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, chosen.std((0, 1, 2)), rtol=1e-6)
    assert mean.dtype == std.dtype == np.float32


def test_fingerprint_depends_on_seed_batch_size_ids_and_rows():
    table = make_table()
    subsets = make_split(table, Config())
    other = table.copy()
    other.loc[subsets.train.rows[0], "id"] = "f" * 40
    fewer = splits.Subset("train", subsets.train.rows[1:])
    fingerprints = [
        splits.fingerprint({"train": table}, subsets, 0, 64),
        splits.fingerprint({"train": table}, subsets, 1, 64),
        splits.fingerprint({"train": table}, subsets, 0, 32),
        splits.fingerprint({"train": other}, subsets, 0, 64),
        splits.fingerprint({"train": table}, dataclasses.replace(subsets, train=fewer), 0, 64),
    ]
    assert len(set(fingerprints)) == 5
    assert splits.fingerprint({"train": table.copy()}, subsets, 0, 64) == fingerprints[0]
    splits.check_fingerprint(fingerprints[0], fingerprints[0], "/records")
    with pytest.raises(UserError, match="/records no longer holds the examples"):
        splits.check_fingerprint(fingerprints[0], fingerprints[1], "/records")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), slides=st.integers(4, 60), share=st.floats(0.2, 0.8))
def test_slides_stay_apart_for_any_seed(seed, slides, share):
    table, config = make_table(count=300, slides=slides, positive=share), Config()
    config.seed = seed
    subsets = make_split(table, config)
    names = table["slide"].to_numpy()
    assert not set(names[subsets.train.rows]) & set(names[subsets.validation.rows])
    assert 0 < len(subsets.validation.rows) < len(subsets.train.rows)


def with_patients(table: pd.DataFrame, patients: int) -> pd.DataFrame:
    """Names the patient of each slide."""
    number = table["slide"].str[1:].astype(int)
    return table.assign(patient=[f"p{k % patients}" for k in number])


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1), patients=st.integers(4, 30), share=st.floats(0.2, 0.8),
    fold=st.sampled_from([None, "2/3"]), mixed=st.booleans(),
)  # fmt: skip
def test_neither_patients_nor_slides_are_divided(seed, patients, share, fold, mixed):
    table, config = make_table(300, 3 * patients, share), Config(seed=seed)
    table = with_patients(table, patients)
    config.data.fold = fold
    if mixed:  # a slide of two patients, spelled differently, and one of none
        slides = table["slide"].unique()
        mixed_slide = table["slide"] == slides[0]
        table.loc[mixed_slide, "patient"] = (["P0", "p1 "] * 150)[: mixed_slide.sum()]
        table.loc[table["slide"] == slides[1], "patient"] = ""
    subsets = make_split(table, config)
    assert (subsets.by, subsets.slide_disjoint, subsets.patient_disjoint) == ("patient", True, True)
    parts = [table.iloc[subset.rows] for subset in both_of(subsets)]
    for unit in ("patient", "slide"):
        assert not overlap.shared_names(*parts, unit)
    assert all((part["patient"] != "").all() and part["label"].nunique() == 2 for part in parts)
    assert sum(map(len, parts)) == (table["patient"] != "").sum()
    again = make_split(table, config)
    np.testing.assert_array_equal(again.validation.rows, subsets.validation.rows)


def test_patches_of_unknown_patients_are_left_out_with_a_warning():
    table = with_patients(make_table(slides=20), 10)
    table.loc[:99, ["patient", "slide"]] = "", ""
    subsets = make_split(table, Config())
    assert sorted(np.concatenate([s.rows for s in both_of(subsets)])) == list(range(100, 400))
    missing = splits.left_out({"train": table}, DataConfig())
    assert "100 of 400 training patches do not name their patient" in missing
    assert splits.left_out({"train": table}, DataConfig(split_by="image")) == ""


def test_patients_are_divided_only_on_request_with_a_caveat():
    table, config = with_patients(make_table(slides=20), 4), Config()
    assert make_split(table, config).by == "patient"
    for by, slide_disjoint in (("slide", True), ("image", False)):
        config.data.split_by = by
        subsets = make_split(table, config)
        assert (subsets.by, subsets.slide_disjoint) == (by, slide_disjoint)
        assert subsets.patient_disjoint is False
        assert "optimistic" in subsets.caveat


def test_patients_without_slides_and_names_that_no_two_patches_share():
    table = make_table()
    config = Config()
    config.data.split_by = "patient"
    with pytest.raises(UserError, match="names no patients"):
        make_split(table, config)
    table["patient"] = [f"p{k // 20}" for k in range(400)]
    subsets = make_split(table, config)  # patients imply slides
    assert (subsets.by, subsets.slide_disjoint, subsets.patient_disjoint) == ("patient", True, True)
    table["patient"] = table["id"]
    subsets = make_split(table, config)
    assert (subsets.by, subsets.slide_disjoint, subsets.patient_disjoint) == ("image", None, None)
    with pytest.raises(UserError, match="all patches come from 1 patient"):
        make_split(table.assign(patient="p"), config)


def test_official_splits_that_share_a_patient_are_refused(messages):
    tables = {
        split: with_patients(make_table(slides=12), 6).assign(id=lambda t, s=split: s + t["id"])
        for split in ("train", "validation", "test")
    }
    for split in ("validation", "test"):
        for column in ("slide", "patient"):
            tables[split][column] = split + tables[split][column]
    subsets = splits.make_subsets(tables, DataConfig(), 0)
    assert (subsets.by, subsets.slide_disjoint, subsets.patient_disjoint) == ("patient", True, True)
    splits.refuse_leak(tables, subsets, allow=False)
    for split in ("validation", "test"):
        shared = tables | {split: tables[split].copy()}
        shared[split].loc[3, "patient"] = "P3 "
        subsets = splits.make_subsets(shared, DataConfig(), 0)
        assert subsets.patient_disjoint is (split != "validation")
        with pytest.raises(UserError, match=f"1 patients .* {split} split, the first is 'p3': cor"):
            splits.refuse_leak(shared, subsets, allow=False)
        splits.refuse_leak(shared, subsets, allow=True)
    assert "LEAK: 1 patients" in "\n".join(messages)


def test_official_splits_are_kept():
    tables = {"train": make_table(100), "validation": make_table(40), "test": make_table(30)}
    tables["validation"]["id"] = "validation " + tables["validation"]["id"]
    config = Config()
    config.data.samples_per_class = 20
    for rule in ("auto", "slide", "image"):
        config.data.split_by = rule
        subsets = splits.make_subsets(tables, config.data, config.data_seed)
        assert (subsets.by, subsets.slide_disjoint) == ("official", None)
        assert "slides not checked" in subsets.division
        assert (subsets.train.records, len(subsets.train.rows)) == ("train", 40)
        assert subsets.validation.records == "validation"
        assert subsets.validation.rows.tolist() == list(range(40))
        assert subsets.test is not None
        assert len(subsets.test.rows) == 30


def test_patches_of_unknown_slides_are_left_out():
    table = make_table(400, slides=20)
    table.loc[:99, "slide"] = ""
    subsets = make_split(table, Config())
    rows = np.concatenate([subsets.train.rows, subsets.validation.rows])
    assert sorted(rows) == list(range(100, 400))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_training_on_patches_of_given_splits_is_refused(messages, split):
    tables = {"train": make_table(100), split: make_table(30)}
    tables[split]["id"] = [f"{i + 1000:040x}" for i in range(30)]
    for name, table in tables.items():
        table["path"] = [f"{name}/{i}.png" for i in range(len(table))]
    subsets = splits.make_subsets(tables, DataConfig(), 0)
    splits.refuse_leak(tables, subsets, allow=False)
    # Those drawn for validation count, too.
    rows = [part.rows[3] for part in (subsets.train, subsets.validation) if part.records == "train"]
    for leaked in tables["train"]["id"].iloc[rows]:
        tables[split].loc[7, "id"] = leaked
        words = f"1 training patches are also {split} .* {leaked} .train/.*{split}/7.png.*allow_le"
        with pytest.raises(UserError, match=words):
            splits.refuse_leak(tables, subsets, allow=False)
    splits.refuse_leak(tables, subsets, allow=True)
    assert "LEAK" in "\n".join(messages)
    # Patches of one colour may be equal by chance.
    tables["train"][list(SQUARES)] -= 1
    splits.refuse_leak(tables, subsets, allow=False)


@pytest.mark.parametrize(
    ("shared", "by"),
    [
        ("nothing", "slide"), ("slide", "image"), ("pixels", "image"), ("glass", "slide"),
        ("one unknown", "official"), ("names of patches", "official"),
    ],
)  # fmt: skip
def test_official_splits_are_slide_disjoint_only_where_they_share_nothing(shared, by):
    train, validation = make_table(slides=4), make_table(slides=4)
    validation["id"] = [f"{i:040x}" for i in range(1000, 1400)]
    validation["slide"] = "other " + validation["slide"]
    if shared == "slide":
        validation.loc[7, "slide"] = train.loc[3, "slide"]
    elif shared in ("pixels", "glass"):
        validation.loc[7, "id"] = train.loc[3, "id"]
    elif shared == "one unknown":
        validation.loc[7, "slide"] = ""
    elif shared == "names of patches":
        train["slide"] = train["id"]
    if shared == "glass":  # of one colour
        train.loc[3, list(SQUARES)] = 9216 * 200**2
    subsets = splits.make_subsets({"train": train, "validation": validation}, DataConfig(), 0)
    assert (subsets.by, subsets.slide_disjoint) == (by, {"slide": True, "image": False}.get(by))


def test_slide_names_that_no_two_patches_share_are_not_slides():
    table = make_table(40)
    table["slide"] = table["id"]
    subsets = make_split(table, Config())
    assert (subsets.by, subsets.slide_disjoint) == ("image", None)
    assert "each patch names a slide of its own" in subsets.division
    assert "checked" in overlap.caveat(subsets.slide_disjoint)
    table.loc[:24, "slide"] = "s"
    assert make_split(table, Config()).slide_disjoint


def test_two_spellings_of_a_slide_are_one_slide():
    one, other = make_table(slides=2), make_table(slides=2)
    other["id"] += "x"
    other["slide"] = other["slide"].str.upper() + " "
    assert overlap.share(one, other)
    assert not overlap.share(one, other.assign(slide="another"))


def test_combine():
    assert overlap.combine([True, None, False]) is False
    assert overlap.combine([True, None]) is None
    assert overlap.combine([True, True]) is True


@pytest.mark.parametrize("slides", [0, 12])
def test_folds_are_disjoint_and_cover_everything(slides):
    tables = {"train": make_table(slides=slides), "validation": make_table(40, slides=2)}
    config = Config()
    config.data.samples_per_class, config.data.split_seed = 100, 7
    folds = []
    for number in range(1, 5):
        config.seed, config.data.fold = number, f"{number}/4"  # other seeds, same division
        subsets = splits.make_subsets(tables, config.data, config.data_seed)
        assert (subsets.by, subsets.slide_disjoint) == (
            ("slide", True) if slides else ("image", False)
        )
        assert subsets.validation.records == "train"  # the data's own validation split is left out
        both = np.concatenate([subsets.train.rows, subsets.validation.rows])
        assert (
            sorted(both) == splits.draw_sample(tables, config.data, config.data_seed).rows.tolist()
        )
        if slides:
            names = (set(tables["train"]["slide"].iloc[subset.rows]) for subset in both_of(subsets))
            assert not set.intersection(*names)
        folds.append(subsets.validation.rows)
    assert (
        sorted(np.concatenate(folds))
        == splits.draw_sample(tables, config.data, config.data_seed).rows.tolist()
    )


def both_of(subsets):
    return subsets.train, subsets.validation


@pytest.mark.parametrize(
    ("slides", "count", "words"),
    [
        (0, 500, "500 patches of label 0, and there are 200"),
        (3, 4, "4 slides, and there are 3"),
        (4, 4, "patches of one class only"),
    ],
)
def test_too_many_folds_are_refused(slides, count, words):
    table, config = make_table(slides=slides), Config()
    table["label"] = (np.arange(400) < 200).astype(int)
    if slides == 4:
        table["slide"] = [f"s{i // 100}" for i in range(400)]
    config.data.fold = f"1/{count}"
    with pytest.raises(UserError, match=words):
        make_split(table, config)


def test_split_seed_replaces_the_seed():
    table, one, other = make_table(slides=9), Config(), Config(seed=5)
    other.data.split_seed = 0
    for name in ("train", "validation"):
        rows = (getattr(make_split(table, config), name).rows for config in (one, other))
        np.testing.assert_array_equal(*rows)


def test_a_leak_is_found_by_pixels_where_ids_are_names():
    train, test = make_table(40).assign(sha1="a"), make_table(40).assign(sha1="b")
    tables = {"train": train, "test": test}
    subsets = splits.make_subsets(tables, DataConfig(), 0)
    splits.refuse_leak(tables, subsets, allow=False)  # the same ids, other pixels
    test.loc[3, "sha1"] = "a"
    with pytest.raises(UserError, match="training patches are also test patches"):
        splits.refuse_leak(tables, subsets, allow=False)
    assert overlap.disjoint((train, np.arange(9)), (test, np.arange(9))) is False
