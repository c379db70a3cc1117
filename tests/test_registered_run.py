"""A residual network with GroupNorm from outside the package: run, kill, resume, every command."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import histo_jax
from histo_jax import registry
from histo_jax.preparation import prepare
from histo_jax.settings import load_run_config

ROOT = Path(__file__).parents[1]
NETWORK = ROOT / "tests" / "models" / "groupnorm_resnet.py"


@pytest.fixture(scope="module")
def killed(tmp_path_factory, kaggle_dir, fork_server):
    """A run of the network, killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("groupnorm")
    process = fork_server.start(
        "-m",
        "histo_jax.main",
        f"--config={NETWORK}",
        f"--workdir={folder / 'run'}",
        "--config.data.source=kaggle",
        f"--config.data.raw_dir={kaggle_dir}",
        f"--config.data.tfds_dir={folder / 'records'}",
        "--config.fit.batch_size=8",
        "--config.fit.steps_per_epoch=80",
        "--config.fit.epochs=1",
        "--config.predict.batch_size=8",
        "--config.checkpoint.every_minutes=0.001",
        '--config.model.kwargs={"widths": [4], "groups": 2}',
        cwd=ROOT,
    )
    deadline = time.monotonic() + 120
    while not saved_steps(folder / "run"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return folder / "run"


def saved_steps(workdir):
    return [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]


@pytest.mark.usefixtures("unregister")
def test_it_is_killed_resumed_evaluated_applied_and_reported_by_its_workdir_alone(
    killed, run_command
):
    assert not (killed / "report.html").exists()
    resumed = run_command(f"--workdir={killed}")  # loads the network's file by itself
    assert resumed.status == 0, resumed.stderr
    assert "resumed from step" in resumed.stderr
    assert json.loads((killed / "status.json").read_text())["state"] == "complete"
    assert pd.read_csv(killed / "history.csv")["step"].tolist() == [80]
    assert "groupnorm_resnet" in (killed / "report.html").read_text()

    # As in another process, where nothing is registered.
    del registry.MODELS._entries["groupnorm_resnet"]
    for mode in ("evaluate", "predict", "report"):
        ended = run_command(f"--workdir={killed}", f"--mode={mode}")
        assert ended.status == 0, ended.stderr

    del registry.MODELS._entries["groupnorm_resnet"]
    predictor = histo_jax.load(killed)
    config = load_run_config(killed)
    prepared = prepare(config)
    rows = np.arange(len(prepared.tables["test"]))
    images = prepared.records("test", rows).images(rows)
    submission = pd.read_csv(killed / "submission.csv")
    np.testing.assert_allclose(predictor(images), submission["label"], rtol=1e-6)
