import functools
import io
import json
import logging
import re
import sys

import jax
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import histo_jax
from histo_jax import fitting
from histo_jax.distributed.mesh import batch_sharding, replicated
from histo_jax.errors import UserError
from histo_jax.run import progress
from histo_jax.training import step as steps
from histo_jax.training.augmentation import make_augment, mixup
from histo_jax.training.checkpoints import Checkpoints


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("histo_jax")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_fit_evaluate_and_predict_from_python(tiny_config, tmp_path, log):
    history = histo_jax.fit(tiny_config, tmp_path)
    assert history.columns.tolist() == list(fitting.HISTORY_COLUMNS)
    assert history["epoch"].tolist() == [1, 2]
    assert history["step"].tolist() == [3, 6]  # 30 training patches in batches of 8
    on_disk = pd.read_csv(tmp_path / "history.csv")
    pd.testing.assert_frame_equal(on_disk, history, check_exact=True)
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["training_patches"]
    assert events.Images("training_patches")[0].width == 5 * 96  # 30 patches: 5 by 5
    scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("train_loss", "validation_auc", "gradient_norm", "weight_norm"):
        assert len(scalars[tag]) == 2, tag
        assert min(scalars[tag]) > 0, tag
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("complete", 6)
    assert status["images_per_second"] > 0
    for word in ("loss", "validation loss", "validation AUC", "img/s", "left"):
        assert word in log.text

    scores = histo_jax.evaluate(tiny_config, str(tmp_path))
    assert scores == json.loads((tmp_path / "evaluation.json").read_text())
    assert scores == json.loads((tmp_path / "evaluation_validation.json").read_text())
    best = history["validation_loss"].idxmin()
    assert scores["checkpoint_step"] == history["step"][best]
    assert scores["nll"] == pytest.approx(history["validation_loss"][best], rel=1e-6)
    assert scores["nll"] < scores["nll_uncalibrated"]
    assert scores["auc"] == pytest.approx(history["validation_auc"][best])
    assert (scores["split"], scores["count"], scores["split_by"]) == ("validation", 10, "image")

    table = histo_jax.predict(tiny_config, tmp_path)
    ids = pd.read_csv(f"{tiny_config.data.raw_dir}/sample_submission.csv")["id"]
    assert table["id"].tolist() == ids.tolist()
    assert table["label"].between(0, 1).all()
    written = pd.read_csv(tmp_path / "submission.csv")
    assert written.columns.tolist() == ["id", "label"]
    np.testing.assert_allclose(written["label"], table["label"], rtol=1e-7)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("is_ci", [False, True])
def test_one_live_line_on_a_terminal_and_none_in_ci(tiny_config, tmp_path, monkeypatch, is_ci):
    (monkeypatch.setenv if is_ci else monkeypatch.delenv)("CI", *(["1"] if is_ci else [False]))
    monkeypatch.setattr(progress, "tqdm", functools.partial(tqdm, mininterval=0))
    make = steps.make_train_step

    def poisoned(*arguments):
        train_step = make(*arguments)

        def step(state, batch):
            if int(state.step) == 5:
                batch = batch | {"label": batch["label"] * np.nan}
            return train_step(state, batch)

        return step

    monkeypatch.setattr(steps, "make_train_step", poisoned)
    tiny_config.fit.epochs, tiny_config.fit.steps_per_epoch = 1, 8
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(UserError, match="step 6 is not finite"):
        histo_jax.fit(tiny_config, tmp_path)
    if is_ci:
        assert screen.getvalue() == ""
        return
    live = [line for line in screen.getvalue().split("\r") if "epoch" in line]
    wanted = r"epoch 1/1: .* 32/64 \[\d\d:\d\d<\d\d:\d\d, .* img/s, loss=0\.\d{4}, step=4\]"
    assert any(re.match(wanted, line) for line in live), live
    # Wiped away, so that what is said of the failure has a line of its own.
    assert screen.getvalue().endswith("\r")
    assert not screen.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip()


def test_the_sheet_shows_patches_of_the_first_batches_as_they_are_trained_on(tiny_config, tmp_path):
    tiny_config.augment.mixup, tiny_config.fit.epochs = 0.5, 1
    histo_jax.fit(tiny_config, tmp_path)
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0}).Reload()
    (sheet,) = events.Images("training_patches")
    shown = np.asarray(Image.open(io.BytesIO(sheet.encoded_image_string)))
    prepared = histo_jax.prepare(tiny_config)
    train = fitting.splits.make_subsets(
        prepared.tables, tiny_config.data, tiny_config.data_seed
    ).train
    order = fitting.loader.training_order(len(train.rows), 8, tiny_config.seed)
    rows = train.rows[np.concatenate([order[step] for step in range(4)])[:30]]
    images = jax.numpy.asarray(prepared.records(train.records, rows).images(np.arange(30)))
    key, mix_key = jax.random.split(jax.random.key(tiny_config.seed))
    turned = make_augment(tiny_config.augment)(key, images)
    wanted, _ = mixup(mix_key, turned, jax.numpy.zeros(30), tiny_config.augment.mixup)
    tiles = shown.reshape(5, 96, 5, 96, 3).swapaxes(1, 2).reshape(25, 96, 96, 3)
    np.testing.assert_array_equal(tiles, np.asarray(wanted[:25]).astype(np.uint8))


def test_fit_twice_in_one_process_and_nothing_compiles_again(tiny_config, tmp_path, monkeypatch):
    compiled = []
    make = steps.make_train_step

    def remember(*arguments):
        compiled.append(make(*arguments))
        return compiled[-1]

    monkeypatch.setattr(steps, "make_train_step", remember)
    tiny_config.fit.epochs = 3
    first = histo_jax.fit(tiny_config, tmp_path / "one")
    second = histo_jax.fit(tiny_config, tmp_path / "two")
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert [step._cache_size() for step in compiled] == [1, 1]


def test_a_continued_run_equals_an_undisturbed_one(tiny_config, tmp_path, log):
    tiny_config.fit.epochs = 1
    histo_jax.fit(tiny_config, tmp_path / "continued")
    tiny_config.fit.epochs = 3
    continued = histo_jax.fit(tiny_config, tmp_path / "continued")
    assert "resumed from step 3" in log.text
    whole = histo_jax.fit(tiny_config, tmp_path / "whole")
    pd.testing.assert_frame_equal(continued, whole, check_exact=True)
    states = []
    for name in ("continued", "whole"):
        with Checkpoints(tmp_path / name) as checkpoints:
            states.append(checkpoints.restore_best(tiny_config, replicated(batch_sharding())).state)
    jax.tree.map(np.testing.assert_array_equal, *states)
    one, other = ((tmp_path / n / "history.csv").read_bytes() for n in ("continued", "whole"))
    assert one == other


def test_a_finished_run_does_nothing(tiny_config, tmp_path, log, monkeypatch):
    first = histo_jax.fit(tiny_config, tmp_path)
    monkeypatch.setattr(fitting, "_train", lambda *_: pytest.fail("trained again"))
    again = histo_jax.fit(tiny_config, tmp_path)
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert "already complete at step 6" in log.text


def test_training_stops_early(tiny_config, tmp_path, log):
    tiny_config.fit.epochs = 30
    tiny_config.early_stopping.patience = 1
    tiny_config.early_stopping.min_delta = 10.0  # nothing after the first epoch improves
    history = histo_jax.fit(tiny_config, tmp_path)
    assert len(history) == 2
    assert "stopped early" in log.text
    assert len(histo_jax.fit(tiny_config, tmp_path)) == 2


def test_a_learnable_difference_is_learnt(tiny_config, tmp_path):
    tiny_config.fit.epochs = 8
    tiny_config.fit.steps_per_epoch = 10
    history = histo_jax.fit(tiny_config, tmp_path)
    assert history["validation_auc"].max() > 0.95
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]


def test_normalisation_is_the_runs_own_and_saved(tiny_config, tmp_path):
    tiny_config.fit.epochs = 1
    histo_jax.fit(tiny_config, tmp_path)
    prepared = histo_jax.prepare(tiny_config)
    split = fitting.splits.make_subsets(prepared.tables, tiny_config.data, tiny_config.data_seed)
    records = prepared.source("train").__getitems__(split.train.rows.tolist())
    pixels = np.stack([record["image"] for record in records]) / 255
    with Checkpoints(tmp_path) as checkpoints:
        weights = checkpoints.restore_best(tiny_config, replicated(batch_sharding())).state.weights
    np.testing.assert_allclose(weights.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(weights.std, pixels.std((0, 1, 2)), rtol=1e-5)


def test_changed_examples_under_a_run_are_refused(tiny_config, tmp_path, make_kaggle):
    tiny_config.data.raw_dir = str(make_kaggle(tmp_path / "raw", seed=5))
    tiny_config.data.tfds_dir = str(tmp_path / "records")
    tiny_config.fit.epochs = 1
    histo_jax.fit(tiny_config, tmp_path / "run")
    tiny_config.data.raw_dir = str(make_kaggle(tmp_path / "other", seed=6))
    tiny_config.data.tfds_dir = str(tmp_path / "other_records")
    tiny_config.fit.epochs = 2
    with pytest.raises(UserError, match="no longer holds the examples"):
        histo_jax.fit(tiny_config, tmp_path / "run")


def test_the_time_left_includes_the_commands_that_follow(tiny_config):
    rows = {"train": 80, "validation": 20, "test": 30}
    named = [fitting.splits.Subset(name, np.arange(count)) for name, count in rows.items()]
    subsets = fitting.splits.Subsets(*named, "image", False)
    assert fitting._patches_after(tiny_config, subsets, ()) == 0
    assert fitting._patches_after(tiny_config, subsets, ("evaluate", "predict")) == 20 + 30
    tiny_config.predict.tta, tiny_config.evaluate.split = True, "test"
    assert fitting._patches_after(tiny_config, subsets, ("evaluate", "predict")) == 7 * (30 + 30)
    report = fitting._patches_after(tiny_config, subsets, ("report",))
    assert report == 36 * 24 * 3
