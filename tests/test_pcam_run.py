"""PatchCamelyon's layout through the verbs."""

import h5py
import numpy as np
import pandas as pd
import pytest

import histo_jax
from histo_jax.data.builder import prepare
from histo_jax.errors import ExpectedError
from histo_jax.prediction import NoTestPatchesError


@pytest.fixture
def pcam_config(tiny_config, tmp_path):
    tiny_config.data.source = "pcam"
    tiny_config.data.raw_dir = str(tmp_path / "raw")
    tiny_config.data.tfds_dir = str(tmp_path / "records")
    tiny_config.fit.epochs = 1
    (tmp_path / "raw").mkdir()
    return tiny_config


def write(folder, name, count):
    rng = np.random.default_rng(count)
    stem = folder / f"camelyonpatch_level_2_split_{name}"
    with h5py.File(f"{stem}_x.h5", "w") as file:
        file["x"] = rng.integers(0, 256, (count, 96, 96, 3), np.uint8)
    with h5py.File(f"{stem}_y.h5", "w") as file:
        file["y"] = (np.arange(count) % 2).astype(np.uint8).reshape(count, 1, 1, 1)
    wsi = [f"{name}_{i % 3}" for i in range(count)]
    pd.DataFrame({"wsi": wsi}).to_csv(f"{stem}_meta.csv", index=False)


def test_official_splits_are_kept_and_scored(pcam_config, tmp_path):
    for name, count in (("train", 24), ("valid", 10), ("test", 13)):
        write(tmp_path / "raw", name, count)
    histo_jax.fit(pcam_config, tmp_path / "run")
    scores = histo_jax.evaluate(pcam_config, tmp_path / "run")
    assert (scores["split"], scores["count"], scores["honest"]) == ("validation", 10, True)
    pcam_config.evaluate.split = "test"
    scores = histo_jax.evaluate(pcam_config, tmp_path / "run")
    assert (scores["split"], scores["count"], scores["honest"]) == ("test", 13, True)
    assert (tmp_path / "run" / "evaluation_validation.json").exists()
    table = histo_jax.predict(pcam_config, tmp_path / "run")
    tables = prepare(pcam_config).tables
    assert table["id"].tolist() == tables["test"]["id"].tolist()
    assert set(tables["train"]["slide"]) == {"train_0", "train_1", "train_2"}


def test_without_a_test_split_there_is_nothing_to_predict(pcam_config, tmp_path):
    for name, count in (("train", 24), ("valid", 10)):
        write(tmp_path / "raw", name, count)
    histo_jax.fit(pcam_config, tmp_path / "run")
    with pytest.raises(NoTestPatchesError, match="no test patches"):
        histo_jax.predict(pcam_config, tmp_path / "run")
    pcam_config.evaluate.split = "test"
    with pytest.raises(ExpectedError, match="missing or have no labels"):
        histo_jax.evaluate(pcam_config, tmp_path / "run")
