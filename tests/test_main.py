"""The real command line, in processes of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
CONFIG = """
from histo_jax.config import Config
def get_config():
    config = Config()
    config.model.features = (2, 2, 2, 2, 2)
    config.model.dense = 4
    config.fit.batch_size = 8
    config.fit.epochs = 1
    config.data.validation_fraction = 0.25
    config.data.source = "kaggle"
    config.data.raw_dir = {raw!r}
    config.data.tfds_dir = {records!r}
    return config
"""


def start(*options, devices=1, path=(), check=True):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "histo_jax.main", *map(str, options)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 or not check, done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_kaggle):
    """A finished run on 13 test images, made where `tensorflow` raises when imported."""
    folder = tmp_path_factory.mktemp("main")
    raw = make_kaggle(folder / "raw", train=40, test=13)
    (folder / "config.py").write_text(CONFIG.format(raw=str(raw), records=str(folder / "records")))
    (folder / "stand_in" / "tensorflow").mkdir(parents=True)
    (folder / "stand_in" / "tensorflow" / "__init__.py").write_text(
        "raise RuntimeError('tensorflow was imported')"
    )
    options = (f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}")
    start(*options, path=[folder / "stand_in"])
    return folder / "run", options


def test_the_main_job_needs_no_tensorflow(run):
    workdir, _ = run
    assert json.loads((workdir / "status.json").read_text())["state"] == "complete"
    ids = pd.read_csv(workdir.parent / "raw" / "sample_submission.csv")["id"]
    assert pd.read_csv(workdir / "submission.csv")["id"].tolist() == ids.tolist()


@pytest.mark.parametrize("devices", [3, 4])
def test_prediction_is_the_same_on_other_devices(run, devices):
    workdir, options = run
    one = pd.read_csv(workdir / "submission.csv")
    start(*options, "--mode=predict", devices=devices)
    several = pd.read_csv(workdir / "submission.csv")
    assert one["id"].tolist() == several["id"].tolist()
    assert len(one) == 13
    np.testing.assert_allclose(one["label"], several["label"], rtol=0, atol=1e-5)


def test_a_finished_run_exits_at_once_and_says_so(run):
    workdir, options = run
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    done = start(*options)
    assert "already complete" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}


def test_prepare_alone_names_the_folder(run, tmp_path):
    _, options = run
    records = tmp_path / "records"
    done = start(*options, f"--config.data.tfds_dir={records}", "--mode=prepare")
    assert str(records) in done.stdout
    assert list(records.rglob("train.csv"))


def test_optional_fields_take_none(run):
    _, options = run
    done = start(
        options[0], "--workdir=/nowhere", "--config.data.samples_per_class=None",
        "--config.fit.batch_size=None", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "fit.batch_size" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_configs_are_valid(path):
    done = start(f"--config={path}", "--workdir=/dev/null/run", "--mode=fit", check=False)
    assert done.returncode == 2
    assert "--workdir=/dev/null/run cannot be written" in done.stderr


def test_a_run_is_predicted_with_again_without_its_config(run, tmp_path):
    workdir, _ = run
    before = pd.read_csv(workdir / "submission.csv")
    (workdir / "submission.csv").unlink()
    assert "histo_jax.models.cnn" in json.loads((workdir / "config.json").read_text())["source"]
    assert "histo_jax.models.cnn" not in (workdir / "report.html").read_text()
    start(f"--workdir={workdir}", "--mode=predict")
    pd.testing.assert_frame_equal(pd.read_csv(workdir / "submission.csv"), before)
    lines = start("--mode=compare", f"--config.compare.runs={workdir},{workdir}").stdout
    assert f"{workdir} minus {workdir}" in lines
    assert not (ROOT / "compare.json").exists()


def test_questions_are_answered_without_the_heavy_imports():
    code = (
        "import sys; from histo_jax import main as m; m._define_flags(); m._parse_flags(sys.argv)"
    )
    watch = "; print([n for n in sys.modules if n in ('jax', 'flax', 'numpy', 'pandas')])"
    for option, words in (("--help", "--config.seed="), ("--version", "histo_jax ")):
        wrapped = f"import atexit, sys; atexit.register(lambda: exec({watch[2:]!r})); {code}"
        command = [sys.executable, "-c", wrapped, option]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert words in done.stdout
        assert done.stdout.endswith("[]\n")


def test_help_lists_every_field():
    text = start("--help").stdout
    for name in ("--workdir", "--mode", "--config.data.raw_dir", "--config.predict.batch_size"):
        assert name in text


def test_a_finished_run_is_evaluated_anew_once_where_that_was_changed(run):
    workdir, options = run
    changed = [*options, "--config.predict.batch_size=5"]
    assert "already complete" not in start(*changed).stdout
    assert '"predict.batch_size": 5' in (workdir / "config.json").read_text()
    assert re.search(r"predict\.batch_size\D+5\D", (workdir / "report.html").read_text())
    assert "already complete" in start(*changed).stdout
