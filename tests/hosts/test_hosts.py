"""One run by several real processes on this machine, with CPU devices and gloo.

The short forms; `HISTO_JAX_LONG=1` adds the long ones.
"""

import functools
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from histo_jax.data.builder import prepare
from histo_jax.data.loader import training_order
from histo_jax.data.splits import make_sides
from histo_jax.errors import ExpectedError
from histo_jax.training import hosts

ROOT = Path(__file__).parents[2]
TRACED = Path(__file__).with_name("traced.py")
CONFIG = """
from histo_jax.config import Config
def get_config():
    config = Config()
    config.data.source, config.data.raw_dir = "kaggle", {raw!r}
    config.data.tfds_dir, config.data.validation_fraction = {records!r}, 0.25
    config.model.features, config.model.dense = (4, 4, 4, 4, 4), 8
    config.fit.batch_size, config.fit.steps_per_epoch, config.fit.epochs = 8, 25, 2
    config.predict.batch_size = 6
    return config
"""
ONE, FOUR, TWO_BY_TWO, TWO_BY_THREE = (1, 1), (1, 4), (2, 2), (2, 3)  # processes, devices of each
LONG = bool(os.environ.get("HISTO_JAX_LONG"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_kaggle):
    """A folder with raw files, of which 7 are to predict, a prime number, and a config."""
    folder = tmp_path_factory.mktemp("hosts")
    raw = make_kaggle(folder / "raw", train=40, test=7)
    text = CONFIG.format(raw=str(raw), records=str(folder / "records"))
    (folder / "config.py").write_text(text)
    return folder


def start(place, topology, workdir, *options, die=None):
    """Starts the run's processes; `die` = (process, moment) kills one, see `traced.py`."""
    count, devices = topology
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for index in range(count):
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }  # fmt: skip
        hosts = [
            "--multihost=manual", f"--coordinator={coordinator}",
            f"--process_count={count}", f"--process_index={index}",
        ]  # fmt: skip
        die_at = die[1] if die and die[0] == index else 0
        trace = workdir.with_name(f"{workdir.name}.trace{index}")
        processes.append(
            subprocess.Popen(
                [sys.executable, str(TRACED), str(trace), str(die_at),
                 f"--config={place / 'config.py'}", f"--workdir={workdir}",
                 *(hosts if count > 1 else ()), *options],
                env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    return processes


def run(place, topology, workdir, *options):
    """Runs to the end, and returns what each process said."""
    return finish(start(place, topology, workdir, *options))


def finish(processes):
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def steps(workdir):
    """Per step the ids of the whole batch and the loss, which all processes must agree on."""
    traces = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(workdir.parent.glob(f"{workdir.name}.trace?"))
    ]
    found = {}
    for parts in zip(*traces, strict=True):
        assert len({(number, loss) for number, _, loss in parts}) == 1
        found[parts[0][0]] = ([i for _, ids, _ in parts for i in ids], parts[0][2])
    return found


def config_of(place):
    return runpy.run_path(place / "config.py")["get_config"]()


def submission(workdir):
    return pd.read_csv(workdir / "submission.csv")


@pytest.fixture(scope="module")
def runs(place):
    """The whole job, or what of it is compared, in each topology."""
    folder = place / "runs"
    folder.mkdir()
    prepare(config_of(place))
    beside = start(place, FOUR, folder / "four", "--mode=fit")
    run(place, ONE, folder / "one")
    finish(beside)
    run(place, TWO_BY_TWO, folder / "two")
    return folder


@pytest.mark.parametrize("name", ["four", "two"])
def test_every_topology_takes_the_same_steps(runs, name):
    wanted, got = steps(runs / "one"), steps(runs / name)
    assert list(got) == list(wanted) == list(range(1, 51))
    assert [ids for ids, _ in got.values()] == [ids for ids, _ in wanted.values()]
    losses = np.array([[loss for _, loss in run.values()] for run in (wanted, got)])
    np.testing.assert_allclose(losses[1, :5], losses[0, :5], rtol=1e-5)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)


@pytest.mark.parametrize("name", ["four", "two"])
def test_one_step_gives_the_same_gradient_and_statistics(runs, name):
    paths = [runs / f"{run}.trace0.npz" for run in ("one", name)]
    with np.load(paths[0]) as one, np.load(paths[1]) as other:
        for name in ("moments", "statistics"):
            largest = np.abs(one[name]).max()
            assert largest > 0
            assert np.abs(one[name] - other[name]).max() <= 1e-5 * largest


def test_only_the_first_process_writes_and_talks(runs):
    # The rest is in the files, which are those of a run by one process.
    assert {p.name for p in (runs / "two").iterdir()} == {p.name for p in (runs / "one").iterdir()}
    assert len(list((runs / "two" / "events").iterdir())) == 1
    assert len(pd.read_csv(runs / "two" / "history.csv")) == 2
    assert json.loads((runs / "two" / "status.json").read_text())["state"] == "complete"


@pytest.mark.parametrize("topology", [TWO_BY_THREE, ONE, FOUR] if LONG else [TWO_BY_THREE], ids=str)
def test_a_checkpoint_predicts_the_same_on_each_topology(place, runs, topology, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "copy")
    (tmp_path / "copy" / "submission.csv").unlink()
    run(place, topology, tmp_path / "copy", "--mode=predict")
    wanted, got = submission(runs / "two"), submission(tmp_path / "copy")
    assert got["id"].tolist() == wanted["id"].tolist()
    assert got["id"].is_unique
    assert len(got) == 7
    np.testing.assert_allclose(got["label"], wanted["label"], rtol=1e-5)


def order(place, first, last):
    """The ids of these steps' batches, from the config alone."""
    config = config_of(place)
    prepared = prepare(config)
    train = make_sides(prepared.tables, config).train
    batches = training_order(len(train.rows), config.fit.batch_size, config.seed)
    ids = prepared.tables[train.records]["id"].to_numpy()
    return {step: ids[train.rows[batches[step - 1]]].tolist() for step in range(first, last + 1)}


def test_the_order_is_that_of_the_config(place, runs):
    assert {step: ids for step, (ids, _) in steps(runs / "two").items()} == order(place, 1, 50)


@pytest.mark.parametrize("begun", ["one", "two"])
def test_training_goes_on_in_the_same_order_on_another_topology(place, runs, begun, tmp_path):
    shutil.copytree(runs / begun, tmp_path / "copy")
    topology = TWO_BY_TWO if begun == "one" else ONE
    said = run(place, topology, tmp_path / "copy", "--mode=fit", "--config.fit.epochs=3")
    assert "resumed from step 50" in said[0]
    went_on = {step: ids for step, (ids, _) in steps(tmp_path / "copy").items()}
    assert went_on == order(place, 51, 75)


@pytest.mark.parametrize("victim", [0, 1] if LONG else [1])
def test_a_run_that_is_stopped_and_then_killed_ends_with_the_same_bytes(
    place, runs, victim, tmp_path
):
    run_it = functools.partial(start, place, TWO_BY_TWO, tmp_path / "run")
    processes = run_it("--mode=fit", die=(victim, -10))
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], said
    stopped = max(steps(tmp_path / "run"))
    assert stopped < 25
    assert f"saved at step {stopped}" in said[0]

    processes = run_it(die=(victim, 30))
    processes[victim].communicate(timeout=120)
    died = time.monotonic()
    said = processes[1 - victim].communicate(timeout=60)[0]
    assert time.monotonic() - died < 60
    assert processes[1 - victim].returncode not in (0, None)
    # Our own line, or JAX's where it was quicker.
    assert "another process of the run has ended" in said or "another task died" in said
    if victim:  # the first process tells
        assert f"resumed from step {stopped}" in said

    said = run(place, TWO_BY_TWO, tmp_path / "run")
    assert "resumed from step 25" in said[0]
    for name in ("history.csv", "submission.csv", "evaluation.json"):
        assert (tmp_path / "run" / name).read_bytes() == (runs / "two" / name).read_bytes()


@pytest.mark.parametrize("victim", [0, 1] if LONG else [0])
def test_the_rest_ends_when_one_dies_in_prediction(place, runs, victim, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "copy")
    before = (tmp_path / "copy" / "submission.csv").read_bytes()
    processes = start(place, TWO_BY_TWO, tmp_path / "copy", "--mode=predict", die=(victim, -1))
    processes[victim].communicate(timeout=120)
    said = processes[1 - victim].communicate(timeout=60)[0]
    assert processes[1 - victim].returncode not in (0, None)
    assert "another process of the run has ended" in said or "another task died" in said
    assert (tmp_path / "copy" / "submission.csv").read_bytes() == before


@pytest.mark.skipif(not LONG, reason="waits for 45 seconds; HISTO_JAX_LONG=1 runs it")
def test_a_process_that_prepares_for_longer_is_waited_for(place, runs, tmp_path, monkeypatch):
    # Longer than the half minute that XLA gives the first meeting of devices on CPU.
    monkeypatch.setenv("HISTO_JAX_TRACED_SECONDS", "45")
    run(place, TWO_BY_TWO, tmp_path / "run", "--mode=fit")
    history = (tmp_path / "run" / "history.csv").read_bytes()
    assert history == (runs / "two" / "history.csv").read_bytes()


MISTAKES = {
    ("manual",): "needs --coordinator=HOST:PORT",
    ("manual", "a:1", 2, 2): "must be from 0",
    ("slurm", None, 2): "leave out --coordinator",
    ("slurm",): "this is no SLURM job",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_in_joining_are_refused(typed, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ExpectedError, match=MISTAKES[typed]):
        hosts.join(*typed, *[None] * (4 - len(typed)))


@pytest.mark.parametrize(
    ("kind", "tasks", "visible"),
    [("slurm", "1(x2)", "all"), ("slurm", "4(x2)", "0"), ("manual", "4(x2)", "all")],
)
def test_a_lone_task_of_slurm_takes_all_devices_of_its_node(kind, tasks, visible):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (f"127.0.0.1:{port}", 1, 0) if kind == "manual" else ()
    code = (
        "import jax; from histo_jax.training import hosts; "
        f"hosts.join(*{(kind, *arguments)}); print(jax.config.values['jax_cuda_visible_devices'])"
    )
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": tasks,
        "JAX_COORDINATOR_PORT": str(port), "XLA_FLAGS": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        text=True,
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert visible in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("said", "is_loss"),
    [
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("INTERNAL: Gloo AllReduce failed: Connection closed by peer", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited", True),
        ("INTERNAL: ptxas exited with non-zero error code", False),
        ("RESOURCE_EXHAUSTED: Out of memory, NCCL allocator", False),
    ],
)
def test_only_what_comes_of_another_process_counts_as_its_loss(said, is_loss, monkeypatch):
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    assert hosts.is_loss(jax.errors.JaxRuntimeError(said)) == is_loss


@pytest.mark.parametrize(
    ("typed", "told"), [("manual", MISTAKES["manual",]), ("some", "should be one of")]
)
def test_a_mistake_in_joining_is_one_line(place, typed, told, tmp_path):
    (process,) = start(place, ONE, tmp_path / "run", f"--multihost={typed}")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2, said
    assert len(said.strip().splitlines()) == 1, said
    assert told in said
    assert not (tmp_path / "run").exists()
