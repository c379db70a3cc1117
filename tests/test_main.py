"""The command line from end to end: one run in a process of its own, the rest in this process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from histo_jax.data import leakage
from histo_jax.prediction import NoTestPatchesError
from histo_jax.version import VERSION

ROOT = Path(__file__).parents[1]
CONFIG = """
from histo_jax.config import Config
def get_config():
    config = Config()
    # As in tests/test_docs.py: what one compiles, the other finds in the cache.
    config.model.features = (4, 4, 4, 4, 4)
    config.model.dense = 8
    config.fit.batch_size = config.predict.batch_size = 8
    config.fit.epochs = 1
    config.data.validation_fraction = 0.25
    config.data.source = "kaggle"
    config.data.raw_dir = {raw!r}
    config.data.tfds_dir = {records!r}
    return config
"""
SCRIPT = """
import sys
from histo_jax.main import cli
sys.exit(cli())
"""


def start(*command, path=(), folder=ROOT, check=True):
    variables = {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=os.environ | variables,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 or not check, done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_kaggle):
    """A finished run on 13 test images, made on one device where importing tensorflow fails."""
    folder = tmp_path_factory.mktemp("main")
    raw = make_kaggle(folder / "raw", train=40, test=13)
    (folder / "config.py").write_text(CONFIG.format(raw=str(raw), records=str(folder / "records")))
    (folder / "stand_in" / "tensorflow").mkdir(parents=True)
    (folder / "stand_in" / "tensorflow" / "__init__.py").write_text(
        "raise RuntimeError('tensorflow was imported')"
    )
    options = (f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}")
    start("-m", "histo_jax.main", *options, path=[folder / "stand_in"])
    return folder / "run", options


def test_a_run_needs_no_tensorflow(run):
    workdir, _ = run
    assert json.loads((workdir / "status.json").read_text())["state"] == "complete"
    ids = pd.read_csv(workdir.parent / "raw" / "sample_submission.csv")["id"]
    assert pd.read_csv(workdir / "submission.csv")["id"].tolist() == ids.tolist()


def test_predictions_without_config_on_several_devices_are_the_same(run, run_command):
    workdir, _ = run
    before = pd.read_csv(workdir / "submission.csv")
    (workdir / "submission.csv").unlink()
    assert "histo_jax.models.cnn" in json.loads((workdir / "config.json").read_text())["source"]
    assert "histo_jax.models.cnn" not in (workdir / "report.html").read_text()
    assert run_command(f"--workdir={workdir}", "--mode=predict").status == 0
    after = pd.read_csv(workdir / "submission.csv")
    assert before["id"].tolist() == after["id"].tolist()
    assert len(before) == 13
    np.testing.assert_allclose(before["label"], after["label"], rtol=0, atol=1e-5)


def test_compare_prints_a_table_and_needs_no_workdir(run, run_command, tmp_path, monkeypatch):
    workdir, _ = run
    monkeypatch.chdir(tmp_path)
    lines = run_command("--mode=compare", f"--config.compare.runs={workdir},{workdir}").stdout
    assert f"{workdir} minus {workdir}" in lines
    assert not list(tmp_path.iterdir())


def test_audit_prints_a_table_and_exits_with_status_1_where_there_is_a_leak(
    run, run_command, monkeypatch
):
    workdir, _ = run
    ended = run_command(f"--workdir={workdir}", "--mode=audit")
    assert (ended.status, "no leak found" in ended.stdout) == (0, True)
    monkeypatch.setattr(leakage, "has_leak", lambda _: True)
    assert run_command(f"--workdir={workdir}", "--mode=audit").status == 1


def test_prepare_names_the_folder(run, run_command, tmp_path):
    _, options = run
    records = tmp_path / "records"
    ended = run_command(*options, f"--config.data.tfds_dir={records}", "--mode=prepare")
    assert str(records) in ended.stdout
    assert list(records.rglob("train.csv"))


def test_optional_fields_take_none(run, run_command):
    _, options = run
    ended = run_command(
        options[0], "--workdir=/nowhere", "--config.data.samples_per_class=None",
        "--config.fit.batch_size=None",
    )  # fmt: skip
    assert ended.status == 2
    assert "fit.batch_size" in ended.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_configs_are_valid(path, run_command):
    ended = run_command(f"--config={path}", "--workdir=/dev/null/run", "--mode=fit")
    assert ended.status == 2
    assert "--workdir=/dev/null/run cannot be written" in ended.stderr


@pytest.mark.parametrize(
    ("option", "words"), [("--help", "--config.predict.batch_size="), ("--version", "histo_jax 0.")]
)
def test_questions_are_answered_without_the_heavy_imports(option, words):
    heavy = "[n for n in sys.modules if n in ('jax', 'flax', 'numpy', 'pandas')]"
    code = (
        f"import atexit, sys; atexit.register(lambda: print({heavy}))\n"
        "from histo_jax import main; main.main(sys.argv)"
    )
    done = start("-c", code, option)
    assert words in done.stdout
    assert done.stdout.endswith("[]\n")


def test_the_console_script_is_the_same_command_line(tmp_path):
    """As pip writes it; modules of the current folder are found, after installed ones."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "histo_jax").write_text(SCRIPT)
    (tmp_path / "bin" / "absl.py").write_text("raise SystemExit('hidden')")
    (tmp_path / "helper.py").write_text("SEED = -7")
    (tmp_path / "absl.py").write_text("raise SystemExit('hidden')")
    (tmp_path / "mine.py").write_text(
        "import helper, histo_jax\ndef get_config(): return histo_jax.Config(seed=helper.SEED)\n"
    )
    script = tmp_path / "bin" / "histo_jax"
    done = start(script, "--config=mine.py", "--workdir=run", folder=tmp_path, check=False)
    assert done.stderr.startswith("histo_jax: config.seed = -7 must be ")
    assert done.returncode == 2
    project = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\nhisto_jax = "histo_jax.main:cli"\n' in project


def test_the_version_is_that_of_the_package():
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()


def test_importing_the_package_shows_no_log():
    code = (
        "import logging, histo_jax; histo_jax.recipe('pcam'); histo_jax.load\n"
        "log = logging.getLogger('histo_jax')\n"
        "log.error('hidden'); print([type(h).__name__ for h in log.handlers], log.level)\n"
        "assert not logging.getLogger().handlers"
    )
    done = start("-c", code)
    assert (done.stdout, done.stderr) == ("['NullHandler'] 0\n", "")


def test_a_finished_run_exits_at_once_and_is_evaluated_once_where_that_changed(
    run, run_command, monkeypatch
):
    workdir, options = run
    calls = []
    for name in ("fitting.fit_in", "evaluate_in"):
        monkeypatch.setattr(f"histo_jax.pipeline.{name}", lambda *_, n=name, **__: calls.append(n))

    def predict_in(*_):
        calls.append("predict_in")
        raise NoTestPatchesError("no test patches")

    monkeypatch.setattr("histo_jax.pipeline.predict_in", predict_in)
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    assert "already complete" in run_command(*options).stdout
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    changed = [*options, "--config.predict.batch_size=5"]
    assert not calls
    printed = run_command(*changed).stdout
    assert "already complete" not in printed
    assert "nothing is predicted: no test patches" in printed
    assert calls == ["fitting.fit_in", "evaluate_in", "predict_in"]
    assert '"predict.batch_size": 5' in (workdir / "config.json").read_text()
    assert re.search(r"predict\.batch_size\D+5\D", (workdir / "report.html").read_text())
    assert "already complete" in run_command(*changed).stdout
