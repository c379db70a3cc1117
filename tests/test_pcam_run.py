"""Commands on PatchCamelyon's layout."""

import copy
import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import histo_jax
from histo_jax import ensemble, evaluation, prediction
from histo_jax.data import leakage, records, splits
from histo_jax.data.example import PatchSpec
from histo_jax.data.splits import make_subsets
from histo_jax.errors import UserError
from histo_jax.metrics import Calibration
from histo_jax.prediction import NoTestPatchesError
from histo_jax.predictor import TrainedModel
from histo_jax.preparation import prepare
from histo_jax.report import patches, report


@pytest.fixture(scope="module")
def make_pcam(make_tiny_config, tmp_path_factory):
    """Makes a folder in PatchCamelyon's layout, and the config of a run on it."""

    def make(train=24, valid=10, test=13, with_slides=True, images=None):
        folder = tmp_path_factory.mktemp("pcam")
        config = make_tiny_config()
        config.data.source, config.fit.epochs = "pcam", 1
        config.data.raw_dir, config.data.tfds_dir = str(folder / "raw"), str(folder / "records")
        (folder / "raw").mkdir()
        for name, count in (("train", train), ("valid", valid), ("test", test)):
            if count:
                write(folder / "raw", name, count, images if name == "train" else None)
                if not with_slides:
                    meta = folder / "raw" / f"camelyonpatch_level_2_split_{name}_meta.csv"
                    meta.unlink()
        return config

    return make


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


@pytest.fixture(scope="module")
def official(make_pcam, tmp_path_factory):
    """A trained run on the official splits, and its config."""
    config, run = make_pcam(), tmp_path_factory.mktemp("official") / "run"
    histo_jax.fit(config, run)
    return config, run


def test_official_splits_are_kept_and_scored(official):
    config, run = copy.deepcopy(official[0]), official[1]
    scores = histo_jax.evaluate(config, run)
    assert (scores["split"], scores["count"], scores["slide_disjoint"]) == ("validation", 10, True)
    (trained,) = histo_jax.load(run).trained
    assert scores["prior"] == trained.calibration.prior == 0.5
    assert scores["nll"] <= scores["nll_uncalibrated"]
    config.evaluate.split = "test"
    scores = histo_jax.evaluate(config, run)
    assert (scores["split"], scores["count"], scores["slide_disjoint"]) == ("test", 13, True)
    assert (run / "evaluation_validation.json").exists()
    table = histo_jax.predict(config, run)
    tables = prepare(config).tables
    assert table["id"].tolist() == tables["test"]["id"].tolist()
    assert set(tables["train"]["slide"]) == {"train_0", "train_1", "train_2"}


def test_without_a_test_split_there_is_nothing_to_predict(official, monkeypatch):
    def without_test(*args, **options):
        prepared = records.prepare(*args, **options)
        del prepared.tables["test"]
        return prepared

    config, run = copy.deepcopy(official[0]), official[1]
    for module in (prediction, evaluation):
        monkeypatch.setattr(module, "prepare", without_test)
    with pytest.raises(NoTestPatchesError, match="no test patches"):
        histo_jax.predict(config, run)
    config.evaluate.split = "test"
    with pytest.raises(UserError, match="missing or have no labels"):
        histo_jax.evaluate(config, run)


def without_attribution(predictor, images):
    return np.zeros(images.shape[:3], np.float32)


def test_slides_that_the_data_does_not_name_are_not_known_anywhere(
    make_pcam, save_run, tmp_path, monkeypatch
):
    config, run = make_pcam(with_slides=False), tmp_path / "run"
    save_run(config, run, Calibration())
    for split in ("validation", "test"):
        config.evaluate.split = split
        scores = histo_jax.evaluate(config, run)
        assert json.loads((run / "evaluation.json").read_text())["slide_disjoint"] is None
        assert (scores["split_by"], scores["interval_over"]) == ("official", "patches")
        assert "was not checked" in scores["note"]
    prepared = prepare(config)
    subsets = make_subsets(prepared.tables, config.data, config.data_seed)
    audited = leakage.audit(prepared, subsets, seed=0)
    assert audited["slide_disjoint"] is None
    assert "was not checked" in leakage.table(audited, ("negative", "positive"))
    assert not leakage.has_leak(audited)
    monkeypatch.setattr(patches, "attribute", without_attribution)  # which compiles for long
    page = report(config, run).read_text()
    assert "Not known whether slide-disjoint" in page
    assert "Slide-disjoint:" not in page
    assert "Optimistic:" not in page
    # An ensemble knows no more than its runs.
    config.predict.checkpoints = str(run)
    assert histo_jax.evaluate(config, tmp_path / "ensemble")["slide_disjoint"] is None


def test_a_run_of_another_source_is_scored_where_it_was_not_trained(
    official, make_tiny_config, tmp_path
):
    """Its patches name no slides, so whether slides are shared is not known."""
    config, run = make_tiny_config(), shutil.copytree(official[1], tmp_path / "run")
    config.predict.checkpoints = str(run)
    scores = histo_jax.evaluate(config, tmp_path / "ensemble")
    assert (scores["count"], scores["slide_disjoint"]) == (10, None)
    path = run / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"data.tfds_dir": str(tmp_path / "none")}))
    with pytest.raises(UserError, match=r"training patches of \S+run are not known .*none"):
        histo_jax.evaluate(config, tmp_path / "ensemble")


def test_a_run_of_another_source_is_refused_where_it_was_trained_on_the_same_pixels(
    make_pcam, make_tiny_config, kaggle_dir
):
    files = sorted((kaggle_dir / "train").glob("*.tif"))
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    theirs, ours = make_pcam(train=len(files), test=0, images=images), make_tiny_config()
    tables = prepare(theirs).tables
    subsets = make_subsets(tables, theirs.data, theirs.data_seed)
    fingerprint = splits.fingerprint(tables, subsets, theirs.seed, theirs.fit.batch_size)
    trained = TrainedModel("run", theirs, None, None, None, 0, fingerprint, PatchSpec(96))
    prepared = prepare(ours)
    validation = make_subsets(prepared.tables, ours.data, ours.data_seed).validation
    with pytest.raises(UserError, match="run was trained on 10 of the 10 patches"):
        ensemble.check_unseen([trained], ours, prepared, validation)
