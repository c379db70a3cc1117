"""One run by several real processes on this machine, with CPU devices and gloo.

`HISTO_JAX_LONG=1` runs more topologies.
"""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

import histo_jax
from histo_jax.data.loader import training_order
from histo_jax.data.splits import make_subsets
from histo_jax.distributed import mesh, processes
from histo_jax.errors import UserError
from histo_jax.models import create_model
from histo_jax.training.checkpoints import Checkpoints
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.state import EarlyStopping, abstract_state

ROOT = Path(__file__).parents[2]
TRACED = Path(__file__).with_name("traced.py")
NETWORK = Path(__file__).parents[1] / "tiny_network.py"
CONFIG = """
import runpy
from histo_jax.config import Config
runpy.run_path({network!r})
def get_config():
    config = Config()
    config.data.source, config.data.raw_dir = "kaggle", {raw!r}
    config.data.tfds_dir, config.data.validation_fraction = {records!r}, 0.25
    config.model.name = "tiny"
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
    text = CONFIG.format(network=str(NETWORK), raw=str(raw), records=str(folder / "records"))
    (folder / "config.py").write_text(text)
    return folder


def start(place, topology, workdir, *options, die=None, second=()):
    """Starts the run's processes; `die` = (process, moment) kills one, see `traced.py`.

    The options `second` are the second one's alone.
    """
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
                 *(hosts if count > 1 else ()), *options, *(second if index == 1 else ())],
                env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    return processes


def run(place, topology, workdir, *options):
    """Runs to the end, and returns the output of each process."""
    return finish(start(place, topology, workdir, *options))


def finish(group, status=0):
    outputs = [process.communicate(timeout=120)[0] for process in group]
    assert [process.returncode for process in group] == [status] * len(group), outputs
    return outputs


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
    """The whole job, or what of it is compared, in each topology; "two" is stopped on its way."""
    folder = place / "runs"
    folder.mkdir()
    histo_jax.prepare(config_of(place))
    beside = [
        start(place, topology, folder / name, "--mode=fit")
        for name, topology in (("one", ONE), ("four", FOUR))
    ]
    group = start(place, TWO_BY_TWO, folder / "two", "--mode=fit", die=(1, -10))
    output = finish(group, status=75)[0]
    last = max(steps(folder / "two"))
    assert last < 25
    assert f"saved at step {last}" in output
    assert f"resumed from step {last}" in run(place, TWO_BY_TWO, folder / "two")[0]
    for group in beside:
        finish(group)
    return folder


@pytest.mark.parametrize("name", ["four", "two"])
def test_every_topology_takes_the_same_steps(runs, name):
    expected, actual = steps(runs / "one"), steps(runs / name)
    assert list(actual) == list(expected) == list(range(1, 51))
    assert [ids for ids, _ in actual.values()] == [ids for ids, _ in expected.values()]
    losses = np.array([[loss for _, loss in run.values()] for run in (expected, actual)])
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


def test_only_the_primary_process_writes_and_logs(runs):
    assert {path.name for path in (runs / "two").iterdir()} == {
        "checkpoints", "config.json", "evaluation.json", "evaluation_validation.json", "events",
        "history.csv", "lock", "predictions_validation.csv", "report", "report.html", "status.json",
        "submission.csv",
    }  # fmt: skip
    assert len(list((runs / "two" / "events").iterdir())) == 2  # it was started twice
    assert len(pd.read_csv(runs / "two" / "history.csv")) == 2
    assert json.loads((runs / "two" / "status.json").read_text())["state"] == "complete"


@pytest.mark.parametrize("topology", [TWO_BY_THREE, ONE, FOUR] if LONG else [TWO_BY_THREE], ids=str)
def test_a_checkpoint_predicts_the_same_on_each_topology(place, runs, topology, tmp_path):
    copy = without(runs / "two", "submission.csv", tmp_path)
    run(place, topology, copy, "--mode=predict")
    expected, actual = submission(runs / "two"), submission(copy)
    assert actual["id"].tolist() == expected["id"].tolist()
    assert actual["id"].is_unique
    assert len(actual) == 7
    np.testing.assert_allclose(actual["label"], expected["label"], rtol=1e-5)


def test_a_checkpoint_scores_the_same_on_each_topology(place, runs, tmp_path):
    """On the four devices of this process; `HISTO_JAX_LONG=1` adds two processes of three."""
    copy = without(runs / "two", "evaluation*", tmp_path)
    if LONG:
        run(place, TWO_BY_THREE, copy, "--mode=evaluate")
    else:
        histo_jax.evaluate(config_of(place), copy)
    files = (folder / "evaluation.json" for folder in (runs / "two", copy))
    expected, actual = (json.loads(path.read_text()) for path in files)
    assert actual["count"] == 10
    for name, value in expected.items():
        close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        assert actual[name] == close


def without(workdir, pattern, folder):
    return shutil.copytree(workdir, folder / "copy", ignore=shutil.ignore_patterns(pattern))


def order(place, first, last):
    """The ids of these steps' batches, from the config alone."""
    config = config_of(place)
    prepared = histo_jax.prepare(config)
    train = make_subsets(prepared.tables, config.data, config.data_seed).train
    batches = training_order(len(train.rows), config.fit.batch_size, config.seed)
    ids = prepared.tables[train.records]["id"].to_numpy()
    return {step: ids[train.rows[batches[step - 1]]].tolist() for step in range(first, last + 1)}


def test_the_order_is_that_of_the_config(place, runs):
    assert {step: ids for step, (ids, _) in steps(runs / "two").items()} == order(place, 1, 50)


def saved_state(place, workdir):
    """The arrays of the newest checkpoint."""
    config = config_of(place)
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    like = abstract_state(model, optimizer, 96, mesh.replicated(mesh.batch_sharding()))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        saved = checkpoints.restore_latest(like, EarlyStopping.create(config.early_stopping))
    leaves = jax.tree.leaves(saved.state)
    assert len(leaves) > 20
    return leaves


MOVES = [("one", TWO_BY_TWO)]
MORE_MOVES = [("two", ONE), ("one", FOUR), ("four", ONE), ("four", TWO_BY_TWO), ("two", FOUR)]


@pytest.mark.parametrize(("begun", "topology"), MOVES + MORE_MOVES if LONG else MOVES, ids=str)
def test_training_resumes_in_the_same_order_on_another_topology(
    place, runs, begun, topology, tmp_path, monkeypatch
):
    shutil.copytree(runs / begun, tmp_path / "copy")
    # The primary process decides: the second one alone would stop after epoch 3.
    monkeypatch.setenv("HISTO_JAX_TRACED_GROWTH", "9")
    options = ("--mode=fit", "--config.fit.epochs=4", "--config.early_stopping.patience=1")
    output = run(place, topology, tmp_path / "copy", *options)[0]
    assert "resumed from step 50" in output
    resumed = {step: ids for step, (ids, _) in steps(tmp_path / "copy").items()}
    assert resumed == order(place, 51, 100)
    with np.load(tmp_path / "copy.trace0.begin.npz") as restored:
        for leaf, name in zip(saved_state(place, runs / begun), restored.files, strict=True):
            np.testing.assert_array_equal(restored[name], leaf)


@pytest.mark.skipif(not LONG, reason="starts six processes; HISTO_JAX_LONG=1 runs it")
def test_processes_that_differ_are_refused_in_one_line(place, make_kaggle, tmp_path):
    # As many patches, but others.
    other = make_kaggle(tmp_path / "raw", train=40, test=7, seed=1)
    elsewhere = (f"--config.data.raw_dir={other}", f"--config.data.tfds_dir={tmp_path / 'records'}")
    cases = {
        "process 1 and process 0 have different records in": elsewhere,
        "--workdir=": (f"--workdir={tmp_path / 'other'}",),
        "process 1 and process 0 have different options": ("--config.fit.epochs=5",),
    }
    started = [
        start(place, TWO_BY_TWO, tmp_path / str(number), "--mode=fit", second=second)
        for number, second in enumerate(cases.values())
    ]
    for message, group in zip(cases, started, strict=True):
        for output in finish(group, status=2):
            assert output.splitlines()[-1].startswith(f"histo_jax: {message}"), output
    assert not any((tmp_path / "1").glob(".*"))


def survivor_output(group, victim):
    """Waits for both of two processes; the one that was not killed must fail."""
    group[victim].communicate(timeout=120)
    output = group[1 - victim].communicate(timeout=60)[0]
    assert group[1 - victim].returncode not in (0, None)
    return output


@pytest.mark.parametrize("victim", [0, 1] if LONG else [1])
def test_a_run_that_is_killed_ends_with_the_same_bytes_as_one_that_was_stopped(
    place, runs, victim, tmp_path
):
    group = start(place, TWO_BY_TWO, tmp_path / "run", die=(victim, 30))
    output = survivor_output(group, victim)
    # Our own line, or JAX's where it was quicker.
    assert "another process of the run was lost" in output or "another task died" in output

    output = run(place, TWO_BY_TWO, tmp_path / "run", "--mode=fit")[0]
    assert "resumed from step 25" in output
    expected, actual = (
        (place / "history.csv").read_bytes() for place in (runs / "two", tmp_path / "run")
    )
    assert actual == expected
    expected, actual = (saved_state(place, folder) for folder in (runs / "two", tmp_path / "run"))
    for leaf, other in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("victim", [0, 1] if LONG else [0])
def test_the_rest_ends_when_one_dies_in_prediction(place, runs, victim, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "copy")
    before = (tmp_path / "copy" / "submission.csv").read_bytes()
    group = start(place, TWO_BY_TWO, tmp_path / "copy", "--mode=predict", die=(victim, -1))
    output = survivor_output(group, victim)
    assert "another process of the run was lost" in output or "another task died" in output
    assert (tmp_path / "copy" / "submission.csv").read_bytes() == before
    if LONG:
        run(place, TWO_BY_TWO, tmp_path / "copy", "--mode=predict")
        assert (tmp_path / "copy" / "submission.csv").read_bytes() == before


def test_a_process_does_not_wait_for_ever_for_others_to_join():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = (
        "import sys; from histo_jax.distributed import processes; "
        "processes._JOIN_SECONDS, processes._NOTICE_SECONDS = 2, 1; "
        f"processes.initialize('manual', '{address}', 3, int(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # The first of three, and the last: each waits alone.
    group = [
        subprocess.Popen(
            [sys.executable, "-c", code, index], env=environment, text=True, stderr=subprocess.PIPE
        )
        for index in "02"
    ]
    for process in group:
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == 75
        first, second = stderr.splitlines()
        assert first == f"histo_jax: waiting for the other processes at {address}"
        assert f"did not join at {address} within 2 s: start all" in second


@pytest.mark.skipif(not LONG, reason="waits for 45 seconds; HISTO_JAX_LONG=1 runs it")
def test_a_process_that_prepares_for_longer_is_waited_for(place, runs, tmp_path, monkeypatch):
    # Longer than the half minute that XLA gives the first collective on CPU.
    monkeypatch.setenv("HISTO_JAX_TRACED_SECONDS", "45")
    run(place, TWO_BY_TWO, tmp_path / "run", "--mode=fit")
    history = (tmp_path / "run" / "history.csv").read_bytes()
    assert history == (runs / "two" / "history.csv").read_bytes()


MISTAKES = {
    ("manual",): "needs --coordinator=HOST:PORT",
    ("manual", "a:1", 2, 2): "must be from 0",
    ("slurm", None, 2): "leave out --coordinator",
    ("slurm",): "this is not a SLURM job",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_in_joining_are_refused(typed, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match=MISTAKES[typed]):
        processes.initialize(*typed, *[None] * (4 - len(typed)))


@pytest.mark.parametrize(
    ("kind", "tasks", "ids"),
    [("slurm", "1(x2)", []), ("auto", "1", []), ("slurm", "4(x2)", None), ("manual", "1", None)],
)
def test_a_single_task_of_slurm_uses_all_devices_of_its_node(kind, tasks, ids, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    assert processes._local_device_ids(kind) == ids
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0")
    assert processes._local_device_ids(kind) is None


def test_jax_takes_no_named_device_for_all_devices():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import jax; from histo_jax.distributed import processes; "
        "processes.initialize('slurm'); print(jax.config.values['jax_cuda_visible_devices'])"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "JAX_COORDINATOR_PORT": str(port),
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        text=True,
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert "all" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("message", "is_process_loss"),
    [
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("INTERNAL: Gloo AllReduce failed: Connection closed by peer", True),
        ("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited", True),
        ("INTERNAL: ptxas exited with non-zero error code", False),
        ("RESOURCE_EXHAUSTED: Out of memory, NCCL allocator", False),
    ],
)
def test_only_errors_of_communication_count_as_a_lost_process(
    message, is_process_loss, monkeypatch
):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    assert processes.is_process_loss(jax.errors.JaxRuntimeError(message)) == is_process_loss


def test_a_mistake_in_joining_is_one_line(place, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "histo_jax.main", f"--config={place / 'config.py'}",
         f"--workdir={tmp_path / 'run'}", "--multihost=manual"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert MISTAKES["manual",] in line
    assert not (tmp_path / "run").exists()
