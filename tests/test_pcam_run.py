"""PatchCamelyon's layout through the verbs."""

import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import histo_jax
from histo_jax.data import leakage
from histo_jax.data.splits import make_subsets
from histo_jax.errors import UserError
from histo_jax.prediction import NoTestPatchesError
from histo_jax.preparation import prepare
from histo_jax.report import patches, report


@pytest.fixture
def pcam_config(tiny_config, tmp_path):
    tiny_config.data.source = "pcam"
    tiny_config.data.raw_dir = str(tmp_path / "raw")
    tiny_config.data.tfds_dir = str(tmp_path / "records")
    tiny_config.fit.epochs = 1
    (tmp_path / "raw").mkdir()
    return tiny_config


def write(folder, name, count, images=None):
    rng = np.random.default_rng(count)
    if images is None:
        images = rng.integers(0, 256, (count, 96, 96, 3), np.uint8)
    stem = folder / f"camelyonpatch_level_2_split_{name}"
    with h5py.File(f"{stem}_x.h5", "w") as file:
        file["x"] = images
    with h5py.File(f"{stem}_y.h5", "w") as file:
        file["y"] = (np.arange(count) % 2).astype(np.uint8).reshape(count, 1, 1, 1)
    wsi = [f"{name}_{i % 3}" for i in range(count)]
    pd.DataFrame({"wsi": wsi}).to_csv(f"{stem}_meta.csv", index=False)


def test_official_splits_are_kept_and_scored(pcam_config, tmp_path):
    for name, count in (("train", 24), ("valid", 10), ("test", 13)):
        write(tmp_path / "raw", name, count)
    histo_jax.fit(pcam_config, tmp_path / "run")
    scores = histo_jax.evaluate(pcam_config, tmp_path / "run")
    assert (scores["split"], scores["count"], scores["slide_disjoint"]) == ("validation", 10, True)
    pcam_config.evaluate.split = "test"
    scores = histo_jax.evaluate(pcam_config, tmp_path / "run")
    assert (scores["split"], scores["count"], scores["slide_disjoint"]) == ("test", 13, True)
    assert (tmp_path / "run" / "evaluation_validation.json").exists()
    table = histo_jax.predict(pcam_config, tmp_path / "run")
    tables = prepare(pcam_config).tables
    assert table["id"].tolist() == tables["test"]["id"].tolist()
    assert set(tables["train"]["slide"]) == {"train_0", "train_1", "train_2"}


def nothing(trained, images):
    return np.zeros(len(images)), np.zeros(images.shape[:3], np.float32)


def test_what_the_data_does_not_say_is_not_known_anywhere(pcam_config, tmp_path, monkeypatch):
    """The official splits, whose files name no slides."""
    for name, count in (("train", 24), ("valid", 10), ("test", 13)):
        write(tmp_path / "raw", name, count)
        (tmp_path / "raw" / f"camelyonpatch_level_2_split_{name}_meta.csv").unlink()
    run = tmp_path / "run"
    histo_jax.fit(pcam_config, run)
    for split in ("validation", "test"):
        pcam_config.evaluate.split = split
        scores = histo_jax.evaluate(pcam_config, run)
        assert json.loads((run / "evaluation.json").read_text())["slide_disjoint"] is None
        assert (scores["split_by"], scores["interval_over"]) == ("official", "patches")
        assert "was not checked" in scores["note"]
    prepared = prepare(pcam_config)
    audited = leakage.audit(
        prepared, make_subsets(prepared.tables, pcam_config.data, pcam_config.data_seed), seed=0
    )
    assert audited["slide_disjoint"] is None
    assert "was not checked" in leakage.table(audited)
    assert not leakage.has_leak(audited)
    monkeypatch.setattr(patches, "look", nothing)  # which compiles for long
    page = report(pcam_config, run).read_text()
    assert "Not known whether honest" in page
    assert "Honest:" not in page
    assert "Optimistic:" not in page
    # An ensemble knows no more than its runs.
    pcam_config.predict.checkpoints = str(run)
    assert histo_jax.evaluate(pcam_config, tmp_path / "ensemble")["slide_disjoint"] is None


def test_without_a_test_split_there_is_nothing_to_predict(pcam_config, tmp_path):
    for name, count in (("train", 24), ("valid", 10)):
        write(tmp_path / "raw", name, count)
    histo_jax.fit(pcam_config, tmp_path / "run")
    with pytest.raises(NoTestPatchesError, match="no test patches"):
        histo_jax.predict(pcam_config, tmp_path / "run")
    pcam_config.evaluate.split = "test"
    with pytest.raises(UserError, match="missing or have no labels"):
        histo_jax.evaluate(pcam_config, tmp_path / "run")


@pytest.mark.parametrize("shared", [True, False])
def test_a_member_of_another_source_is_judged_by_what_it_has_trained_on(
    shared, pcam_config, make_tiny_config, kaggle_dir, tmp_path
):
    files = sorted((kaggle_dir / "train").glob("*.tif"))
    images = np.stack([np.asarray(Image.open(file)) for file in files]) if shared else None
    write(tmp_path / "raw", "train", len(files), images)
    write(tmp_path / "raw", "valid", 10)
    histo_jax.fit(pcam_config, tmp_path / "run")
    config = make_tiny_config()
    config.predict.checkpoints = str(tmp_path / "run")
    if not shared:
        assert histo_jax.evaluate(config, tmp_path / "judged")["count"] == 10
        shutil.rmtree(tmp_path / "records")
        (tmp_path / "raw" / "camelyonpatch_level_2_split_train_x.h5").unlink()
    said = "has trained on 10 of the 10 patches" if shared else r"run has trained on cannot be told"
    with pytest.raises(UserError, match=said):
        histo_jax.evaluate(config, tmp_path / "judged")


def test_slides_that_a_member_may_have_trained_on_make_no_honest_score(
    pcam_config, make_tiny_config, tmp_path
):
    """The member's patches name no slides, so nobody can tell."""
    kaggle = make_tiny_config()
    kaggle.fit.epochs = 1
    histo_jax.fit(kaggle, tmp_path / "run")
    for name, count in (("train", 24), ("valid", 10)):
        write(tmp_path / "raw", name, count)
    pcam_config.predict.checkpoints = str(tmp_path / "run")
    assert histo_jax.evaluate(pcam_config, tmp_path / "judged")["slide_disjoint"] is None
