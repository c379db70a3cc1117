"""`predict.images`: a folder or a table of images, scored by a trained run."""

import copy
import fcntl
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import histo_jax
from histo_jax.config import ModelConfig
from histo_jax.errors import UserError
from histo_jax.metrics import Calibration, binary_scores
from histo_jax.run import signals

runpy.run_path(str(Path(__file__).parent / "tiny_network.py"))
IMAGES = np.random.default_rng(3).integers(0, 256, (11, 96, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def config(make_tiny_config):
    config = make_tiny_config()
    config.model = ModelConfig(name="tiny")
    return config


@pytest.fixture(scope="module")
def run(config, save_run, tmp_path_factory):
    """A run without its records and raw data."""
    folder = tmp_path_factory.mktemp("image_prediction")
    config.data.tfds_dir = str(folder / "records")
    run = save_run(config, folder / "run", Calibration(1.5, -0.2, 0.4))
    shutil.rmtree(config.data.tfds_dir)
    config.data.raw_dir = str(folder / "gone")
    saved = run / "config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"data.raw_dir": str(folder)}))
    return run


@pytest.fixture
def folder(tmp_path):
    """Eleven images, in folders and beside them, between files that are none."""
    folder = tmp_path / "images"
    for number, image in enumerate(IMAGES):
        path = folder / ("train/er", "a", "")[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "a" / "03b.png").write_bytes((folder / "a" / "01.png").read_bytes()[:500])
    (folder / "05b.jpg").write_bytes(b"")
    Image.new("RGB", (64, 64)).save(folder / "06b.png")
    Image.new("CMYK", (96, 96)).save(folder / "07b.jpg")
    for name in ("Thumbs.db", "._00.png", ".DS_Store", "notes.txt"):
        (folder / name).write_bytes(b"?")
    return folder


def files_of(run):
    paths = (path for path in run.rglob("*") if path.is_file() and path.stem != "predictions")
    return {path: path.read_bytes() for path in paths}


def predict(run_command, run, images):
    return run_command(f"--workdir={run}", "--mode=predict", f"--config.predict.images={images}")


def read(run):
    return pd.read_csv(run / "predictions.csv"), json.loads((run / "predictions.json").read_text())


def test_a_folder_is_scored_as_by_the_predictor_and_nothing_else_changes(run, folder, run_command):
    before = files_of(run)
    with (run / "lock").open("a") as lock:  # another process trains there
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = predict(run_command, run, folder)
    assert ended.status == 0, ended.stderr
    (run / "lock").unlink()
    assert files_of(run) == before
    table, result = read(run)
    assert list(table) == ["path", "probability"]
    paths = sorted(path for path in folder.rglob("[01]?.png"))
    assert table["path"].tolist() == [path.relative_to(folder).as_posix() for path in paths]
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    expected = histo_jax.load(run)(pixels)
    assert [f"{p:.8g}" for p in table["probability"]] == [f"{p:.8g}" for p in expected]
    assert (result["scored"], result["unreadable"]) == (11, 4)
    assert "auc" not in result
    for words in (
        "03b.png is not a readable", "05b.jpg is empty",
        "06b.png is 64x64 pixels; the network needs 96x96", "07b.jpg is CMYK",
        "4 of 15 images could not be read",
    ):  # fmt: skip
        assert words in ended.stderr


def test_a_table_keeps_its_order_and_gives_scores(config, run, folder, log):
    names = [path.relative_to(folder) for path in sorted(folder.rglob("[01]?.png"))][::-1]
    rows = [f"{name},{int(name.stem) % 2 if k else ''}" for k, name in enumerate(names)]
    table = folder.parent / "list.csv"
    rows = [f"images/{row},fold {k}" for k, row in enumerate(rows)]
    table.write_text("\n".join(["File Name,label,split", *rows, "images/missing.png,1"]))
    config.predict.images = str(table)
    predicted = histo_jax.predict(config, run)
    assert predicted["path"].tolist() == [f"images/{name}" for name in names]
    assert predicted["label"].isna().tolist() == [True] + [False] * 10
    written, result = read(run)
    labels = predicted["label"][1:].to_numpy(np.float64)
    pixels = np.stack([np.asarray(Image.open(folder / name)) for name in names])
    logits = histo_jax.load(run).logits(pixels)
    for name, value in binary_scores(logits[1:], labels).items():
        assert result[name] == pytest.approx(value), name
    assert list(written) == ["path", "probability", "label"]
    assert (result["count"], result["scored"], result["unreadable"]) == (10, 11, 1)
    assert "missing.png cannot be read (No such file or directory)" in log.text
    assert "10 labelled images" in log.text


def test_ensembles_symmetries_and_priors_are_those_of_the_predictor(config, run, folder, tmp_path):
    paths = sorted(folder.rglob("[01]?.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    twin = shutil.copytree(run, tmp_path / "twin")
    config = copy.deepcopy(config)
    config.predict.images, config.predict.tta, config.predict.prior = str(folder), True, 0.1
    config.predict.checkpoints = f"{run},{twin}"
    predicted = histo_jax.predict(config, tmp_path / "ensemble")
    predictor = histo_jax.load(run, twin, tta=True, prior=0.1)
    np.testing.assert_array_equal(predicted["probability"], predictor(pixels))
    assert {p.name for p in (tmp_path / "ensemble").iterdir()} == {
        "predictions.csv", "predictions.json",
    }  # fmt: skip


def test_images_of_any_size_are_scaled_where_the_run_scales(config, run, tmp_path, log):
    scaled = shutil.copytree(run, tmp_path / "run")
    config = copy.deepcopy(config)
    config.data.image_size, config.data.positive = 96, "tumour"
    saved = json.loads((scaled / "config.json").read_text())
    saved |= {"data.image_size": 96, "data.positive": "tumour"}
    (scaled / "config.json").write_text(json.dumps(saved))
    for label, size in ((0, (192, 192)), (1, (96, 130))):
        path = tmp_path / "images" / str(label) / "x.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", size, (200, 100 * label, 150)).save(path)
    config.predict.images = str(tmp_path / "images")
    predicted = histo_jax.predict(config, scaled)
    assert predicted["path"].tolist() == ["0/x.png", "1/x.png"]
    assert predicted["label"].tolist() == [0, 1]
    pixels = np.stack([np.full((96, 96, 3), (200, 100 * k, 150), np.uint8) for k in (0, 1)])
    np.testing.assert_array_equal(predicted["probability"], histo_jax.load(scaled)(pixels))
    (tmp_path / "images" / "1" / "x.png").rename(tmp_path / "images" / "0" / "y.png")
    histo_jax.predict(config, scaled)
    assert "AUC not defined, because all labels are equal, NLL" in log.text
    config.predict.images = str(tmp_path / "images" / "0" / "y.png")
    single = histo_jax.predict(config, scaled)
    assert single["path"].tolist() == ["y.png"]
    np.testing.assert_array_equal(single["probability"], predicted["probability"][1:])


def test_failures_keep_the_old_file(config, run, folder, tmp_path, monkeypatch, run_command):
    config = copy.deepcopy(config)
    config.predict.images = str(folder)
    histo_jax.predict(config, run)
    before = (run / "predictions.csv").read_bytes()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"?")
    for place, words in (
        (tmp_path / "broken", "none of 1 images could be read"),
        (tmp_path / "nowhere", "no such file or folder"),
    ):
        ended = predict(run_command, run, place)
        assert (ended.status, words in ended.stderr) == (2, True), ended.stderr
    with monkeypatch.context() as patch:
        patch.setattr(signals, "_received", 15)
        with pytest.raises(signals.Preempted):
            histo_jax.predict(config, run)
    assert (run / "predictions.csv").read_bytes() == before
    config.predict.checkpoints = ""
    with pytest.raises(UserError, match="checkpoint"):
        histo_jax.predict(config, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
