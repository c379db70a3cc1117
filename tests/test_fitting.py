import functools
import io
import json
import logging
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import histo_jax
from histo_jax import fitting
from histo_jax.config import EarlyStoppingConfig, ModelConfig
from histo_jax.data import loader, splits
from histo_jax.distributed.mesh import batch_sharding, replicated
from histo_jax.errors import UserError
from histo_jax.run import progress
from histo_jax.training import step as steps
from histo_jax.training.augmentation import make_augment, mixup
from histo_jax.training.callbacks import HISTORY_COLUMNS, check_callbacks
from histo_jax.training.checkpoints import Checkpoints
from histo_jax.training.clock import TrainingClock
from histo_jax.training.epoch_log import follow_up_passes
from histo_jax.training.loop import Plan
from histo_jax.training.patch_sheet import draw_patch_sheet
from histo_jax.training.state import EarlyStopping, update

runpy.run_path(str(Path(__file__).with_name("tiny_network.py")))


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("histo_jax")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


class Recorder:
    """Any object is a callback; this one records what it is given, and fails when told to."""

    def __init__(self, fail_at=None):
        self.logs, self.images, self.fail_at = [], [], fail_at

    def on_epoch_end(self, epoch, logs):
        assert epoch == logs["epoch"]
        if epoch == self.fail_at:
            raise ValueError("broken\nconnection")
        self.logs.append(logs.copy())
        logs.clear()  # it may do with its copy what it likes


class ImageRecorder(Recorder):
    def on_images(self, name, step, image):
        self.images.append((name, step, image))


@pytest.fixture(scope="module")
def make_tiny_config(make_tiny_config):
    """Its network compiles quickly: the loop around it is tested."""

    def make():
        config = make_tiny_config()
        config.model = ModelConfig(name="tiny")
        return config

    return make


@pytest.fixture(scope="module")
def trained(make_tiny_config, tmp_path_factory):
    """A run of three epochs."""
    config, folder = make_tiny_config(), tmp_path_factory.mktemp("trained")
    config.fit.epochs = 3
    plain, images = Recorder(), ImageRecorder()
    logger, records = logging.getLogger("histo_jax"), []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    history = histo_jax.fit(config, folder, callbacks=[plain, images])
    logger.setLevel(level)
    logger.removeHandler(handler)
    return SimpleNamespace(
        config=config, folder=folder, history=history, log=records, plain=plain, images=images
    )


def test_fit_evaluate_and_predict_from_python(trained):
    history, folder = trained.history, trained.folder
    assert history.columns.tolist() == list(HISTORY_COLUMNS)
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history["step"].tolist() == [3, 6, 9]  # 30 training patches in batches of 8
    on_disk = pd.read_csv(folder / "history.csv")
    pd.testing.assert_frame_equal(on_disk, history, check_exact=True)
    events = EventAccumulator(str(folder / "events"), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["training_patches"]
    assert events.Images("training_patches")[0].width == 5 * 96  # 30 patches: 5 by 5
    scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("train_loss", "validation_auc", "gradient_norm", "weight_norm"):
        assert len(scalars[tag]) == 3, tag
        assert min(scalars[tag]) > 0, tag
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("complete", 9)
    assert status["images_per_second"] > 0
    assert 0 < status["minutes_trained"] < 60
    assert any("without compilation" in message for message in trained.log)
    for word in ("loss", "validation loss", "validation AUC", "img/s", "left"):
        assert word in "\n".join(trained.log)

    scores = histo_jax.evaluate(trained.config, str(folder))
    assert scores == json.loads((folder / "evaluation.json").read_text())
    assert scores == json.loads((folder / "evaluation_validation.json").read_text())
    best = history["validation_loss"].idxmin()
    assert scores["checkpoint_step"] == history["step"][best]
    assert scores["nll"] == pytest.approx(history["validation_loss"][best], rel=1e-6)
    assert scores["nll"] < scores["nll_uncalibrated"]
    assert scores["auc"] == pytest.approx(history["validation_auc"][best])
    assert (scores["split"], scores["count"], scores["split_by"]) == ("validation", 10, "image")

    table = histo_jax.predict(trained.config, folder)
    ids = pd.read_csv(f"{trained.config.data.raw_dir}/sample_submission.csv")["id"]
    assert table["id"].tolist() == ids.tolist()
    assert table["label"].between(0, 1).all()
    written = pd.read_csv(folder / "submission.csv")
    assert written.columns.tolist() == ["id", "label"]
    np.testing.assert_allclose(written["label"], table["label"], rtol=1e-7)


def test_callbacks_get_each_epoch_and_the_training_patches(trained):
    for callback in (trained.plain, trained.images):
        assert len(callback.logs) == 3
        for logs, (_, row) in zip(callback.logs, trained.history.iterrows(), strict=True):
            assert {name: logs[name] for name in HISTORY_COLUMNS} == row.to_dict()
            assert min(logs["gradient_norm"], logs["weight_norm"]) > 0
    [(name, step, image)] = trained.images.images
    assert (name, step, image.dtype, image.shape) == (
        "training_patches",
        0,
        np.uint8,
        (480, 480, 3),
    )
    events = EventAccumulator(str(trained.folder / "events"), size_guidance={"images": 0}).Reload()
    encoded = events.Images("training_patches")[0].encoded_image_string
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), image)


def test_a_resumed_run_equals_an_undisturbed_one_and_compiles_each_step_once(
    trained, make_tiny_config, tmp_path, log, monkeypatch
):
    """It ends after an epoch, then by a callback that fails, then goes to the end."""
    compiled = []
    make = steps.make_train_step

    def remember(*arguments):
        compiled.append(make(*arguments))
        return compiled[-1]

    monkeypatch.setattr(steps, "make_train_step", remember)
    config = make_tiny_config()
    config.fit.epochs = 1
    histo_jax.fit(config, tmp_path)
    config.fit.epochs = 3
    failing = ImageRecorder(fail_at=2)
    message = (
        r"^callback ImageRecorder\.on_epoch_end failed: ValueError: broken connection; the run is "
        "saved: fix the callback and rerun to resume$"
    )
    with pytest.raises(UserError, match=message) as error:
        histo_jax.fit(config, tmp_path, callbacks=[failing])
    assert isinstance(error.value.__cause__, ValueError)
    assert (failing.logs, failing.images) == ([], [])
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 6)
    assert (tmp_path / "checkpoints" / "6").exists()
    resumed = histo_jax.fit(config, tmp_path)
    total = json.loads((tmp_path / "status.json").read_text())["minutes_trained"]
    assert total > status["minutes_trained"] > 0
    assert "resumed from step 3" in log.text
    assert "resumed from step 6" in log.text
    assert [step._cache_size() for step in compiled] == [1, 1, 1]
    pd.testing.assert_frame_equal(resumed, trained.history, check_exact=True)
    states = []
    for folder in (tmp_path, trained.folder):
        with Checkpoints(folder) as checkpoints:
            states.append(checkpoints.restore_best(config, replicated(batch_sharding())).state)
    jax.tree.map(np.testing.assert_array_equal, *states)
    one, other = ((path / "history.csv").read_bytes() for path in (tmp_path, trained.folder))
    assert one == other


def test_the_first_epochs_train_on_the_centre(trained, make_tiny_config, tmp_path, monkeypatch):
    images, compiled = [], []
    make = steps.make_train_step

    def record(*arguments):
        compiled.append(make(*arguments))

        def train_step(state, batch):
            images.append(jax.device_get(batch["image"]))
            return compiled[-1](state, batch)

        return train_step

    monkeypatch.setattr(steps, "make_train_step", record)
    for crop_epochs in (0, 1):
        config = make_tiny_config()
        config.fit.epochs, config.fit.crop_epochs = 2, crop_epochs
        histo_jax.fit(config, tmp_path / str(crop_epochs))
    whole, cropped = images[:6], images[6:]
    for step in range(3):
        np.testing.assert_array_equal(cropped[step], whole[step][:, 16:80, 16:80])
        np.testing.assert_array_equal(cropped[3 + step], whole[3 + step])
    assert [step._cache_size() for step in compiled] == [1, 2]


def test_the_first_epochs_on_the_centre_neither_stop_the_run_nor_count_as_whole_ones():
    plan = Plan(8, 3, 10, 0, 60.0, 0, crop_epochs=4, crop_size=48)
    start = EarlyStopping.create(EarlyStoppingConfig(patience=1))
    stopped = update(update(start, 0.5), 0.6)
    assert [plan.is_done(stopped, [None] * epochs) for epochs in (4, 5)] == [False, True]
    assert plan.is_done(start, [None] * 10)
    assert plan.cost_left(1, 96) == 3 + 6 * 4
    assert plan.cost_left(4, 96) == 6 * 4
    assert plan.cost_left(5, 96) == 5


def test_the_clock_counts_what_lies_between_start_and_pause(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("histo_jax.training.clock.time.monotonic", lambda: now[0])
    clock = TrainingClock(minutes=2)
    for action in (clock.start, clock.start, clock.pause, clock.pause, clock.start):
        action()
        now[0] += 60
    assert clock.minutes == 2 + 2 + 1


def test_a_callback_that_fails_before_the_first_step_stops_the_run_after_a_save(
    tiny_config, tmp_path
):
    class Broken:
        def on_images(self, *_):
            raise RuntimeError

    with pytest.raises(UserError, match=r"^callback Broken\.on_images failed: RuntimeError"):
        histo_jax.fit(tiny_config, tmp_path, callbacks=[Broken()])
    assert (tmp_path / "checkpoints" / "0").exists()
    assert not (tmp_path / "history.csv").exists()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (Recorder(), r"callbacks is a Recorder; it must be a list of callbacks, \[Recorder\(\)\]"),
        ([Recorder], r"callbacks\[0\] is the class Recorder: pass an object, Recorder\(\)"),
        ([Recorder(), 3], r"callbacks\[1\] \(int\) has none of the methods on_epoch_end, on_im"),
    ],
)
def test_what_is_not_a_callback_is_refused(callbacks, message):
    with pytest.raises(UserError, match=message):
        check_callbacks(callbacks)


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
    expected = r"epoch 1/1: .* 32/64 \[\d\d:\d\d<\d\d:\d\d, .* img/s, loss=0\.\d{4}, step=4\]"
    assert any(re.match(expected, line) for line in live), live
    # The bar is cleared, so that the error message has a line of its own.
    assert screen.getvalue().endswith("\r")
    assert not screen.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip()


def test_the_sheet_shows_patches_of_the_first_batches_as_they_are_trained_on(tiny_config):
    prepared = histo_jax.prepare(tiny_config)
    train = splits.make_subsets(prepared.tables, tiny_config.data, tiny_config.data_seed).train
    augment = make_augment(tiny_config.augment)
    sheet = draw_patch_sheet(prepared.records(*train), 8, augment, 0.5, seed=3)
    order = loader.training_order(len(train.rows), 8, 3)
    rows = train.rows[np.concatenate([order[step] for step in range(4)])[:30]]
    images = jax.numpy.asarray(prepared.records(train.records, rows).images(np.arange(30)))
    key, mixup_key = jax.random.split(jax.random.key(3))
    expected, _ = mixup(mixup_key, augment(key, images), jax.numpy.zeros(30), 0.5)
    tiles = sheet.reshape(5, 96, 5, 96, 3).swapaxes(1, 2).reshape(25, 96, 96, 3)
    np.testing.assert_array_equal(tiles, np.asarray(expected[:25]).astype(np.uint8))


def test_a_finished_run_does_nothing(trained, log, monkeypatch):
    monkeypatch.setattr(fitting, "Trainer", lambda *_: pytest.fail("trained again"))
    history = histo_jax.fit(trained.config, trained.folder)
    pd.testing.assert_frame_equal(history, trained.history, check_exact=True)
    assert "already complete at step 9" in log.text


def test_training_stops_early(tiny_config, tmp_path, log):
    tiny_config.fit.epochs = 30
    tiny_config.early_stopping.patience = 1
    tiny_config.early_stopping.min_delta = 10.0  # nothing after the first epoch improves
    history = histo_jax.fit(tiny_config, tmp_path)
    assert len(history) == 2
    assert "early stopping: no better" in log.text
    assert len(histo_jax.fit(tiny_config, tmp_path)) == 2


def test_a_learnable_difference_is_learnt(tiny_config, tmp_path):
    tiny_config.fit.epochs = 8
    tiny_config.fit.steps_per_epoch = 10
    history = histo_jax.fit(tiny_config, tmp_path)
    assert history["validation_auc"].max() > 0.95
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]


def test_normalisation_is_the_runs_own_and_saved(trained):
    prepared = histo_jax.prepare(trained.config)
    split = splits.make_subsets(prepared.tables, trained.config.data, trained.config.data_seed)
    records = prepared.source("train").__getitems__(split.train.rows.tolist())
    pixels = np.stack([record["image"] for record in records]) / 255
    with Checkpoints(trained.folder) as checkpoints:
        best = checkpoints.restore_best(trained.config, replicated(batch_sharding()))
    np.testing.assert_allclose(best.state.weights.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(best.state.weights.std, pixels.std((0, 1, 2)), rtol=1e-5)


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


def test_the_time_left_includes_the_commands_that_follow():
    assert follow_up_passes((), 20, 30, False) == 0
    assert follow_up_passes(("evaluate", "predict"), 20, 30, False) == 20 + 30
    assert follow_up_passes(("evaluate", "predict"), 30, 30, True) == 7 * (30 + 30)
    assert follow_up_passes(("report",), 20, 30, False) == 36 * 24 * 3
