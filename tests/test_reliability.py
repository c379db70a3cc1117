"""Signals, locks, values that are not finite, full disks, corruption.

Where the behaviour of a process matters it is a real one, see `fork_server.py`; everything else
runs in this process.
"""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import histo_jax
from histo_jax.config import Config
from histo_jax.data import loader, splits
from histo_jax.errors import UserError
from histo_jax.run import signals
from histo_jax.run.workdir import Workdir
from histo_jax.training import step as steps
from histo_jax.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[1]
CONFIG = """
import runpy
from histo_jax.config import Config
runpy.run_path({network!r})
def get_config():
    config = Config()
    config.data.source, config.data.validation_fraction = "kaggle", 0.25
    config.data.raw_dir, config.data.tfds_dir = {raw!r}, {records!r}
    config.model.name, config.optimizer.learning_rate = "tiny", 0.01
    config.optimizer.name, config.optimizer.weight_decay, config.fit.crop_epochs = "muon", 0.05, 1
    config.fit.batch_size, config.fit.steps_per_epoch, config.fit.epochs = 8, 100_000, 2
    return config
"""


class Command:
    """The real command on a run that would take hours."""

    def __init__(self, folder: Path, make_kaggle, fork_server) -> None:
        self.fork_server = fork_server
        self.workdir, self.config = folder / "run", folder / "config.py"
        raw = make_kaggle(folder / "raw")
        network = str(Path(__file__).parent / "tiny_network.py")
        records = str(folder / "records")
        self.config.write_text(CONFIG.format(network=network, raw=str(raw), records=records))
        self.argv = ["-m", "histo_jax.main", f"--config={self.config}"]

    def start(self, *options: str):
        # With as many devices as this process has, whose compiled programs it then finds.
        return self.fork_server.start(*self.argv, f"--workdir={self.workdir}", *options)

    def wait_for(self, process, ready) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def get_config(self, epochs: int = 2, steps: int = 3) -> Config:
        config = runpy.run_path(str(self.config))["get_config"]()
        config.fit.epochs, config.fit.steps_per_epoch = epochs, steps
        return config


@pytest.fixture(scope="module")
def command(tmp_path_factory, make_kaggle, fork_server):
    return Command(tmp_path_factory.mktemp("reliability"), make_kaggle, fork_server)


def test_signals_save_and_leave_and_the_lock_keeps_others_out(command, log):
    """One run in three processes: SIGTERM, Ctrl-C, and a second signal before the first is seen."""
    run, saved = Workdir(command.workdir), command.workdir / "checkpoints"
    options = ("--mode=fit", "--config.checkpoint.every_minutes=0.01")

    def newest():
        return max((int(path.name) for path in saved.glob("*") if path.name.isdigit()), default=0)

    first = command.start(*options)
    # The first save is read back before the status has its step.
    command.wait_for(first, lambda: newest() and run.status()["step"] > 0)
    assert run.status()["state"] == "running"
    with pytest.raises(UserError, match=f"{command.workdir} is in use by process {first.pid} on"):
        histo_jax.fit(command.get_config(steps=100_000), command.workdir)
    first.send_signal(signal.SIGTERM)
    began = time.monotonic()
    stderr = first.communicate(timeout=60)[1]
    assert first.returncode == signals.EXIT_STATUS == 75
    assert time.monotonic() - began < 15
    assert "Traceback" not in stderr
    status = run.status()
    assert status["state"] == "preempted"
    assert f"preempted, saved at step {status['step']}" in stderr
    assert newest() == status["step"]

    second = command.start(*options)
    before = newest()
    command.wait_for(second, lambda: newest() > before)
    second.send_signal(signal.SIGINT)
    stderr = second.communicate(timeout=60)[1]
    assert second.returncode == 130, stderr
    assert f"resumed from step {status['step']}" in stderr
    assert "press Ctrl-C again to exit at once" in stderr
    assert re.search(r"histo_jax: interrupted, saved at step \d+;", stderr.splitlines()[-1])
    assert "Traceback" not in stderr
    assert run.status()["state"] == "failed"

    third = command.start(*options)
    command.wait_for(third, lambda: run.status()["state"] == "running")
    # Stopped, it cannot handle the first one before the second is there.
    third.send_signal(signal.SIGSTOP)
    third.send_signal(signal.SIGTERM)
    third.send_signal(signal.SIGUSR1)
    third.send_signal(signal.SIGCONT)
    third.communicate(timeout=20)
    assert third.returncode in (128 + signal.SIGUSR1, 128 + signal.SIGTERM)
    assert run.status()["state"] == "running"  # nothing could be written any more
    # The dead process holds no lock.
    with pytest.raises(UserError, match="no finished epoch"):
        histo_jax.evaluate(command.get_config(steps=100_000), command.workdir)
    assert f"the last process in {command.workdir} was killed or crashed" in log.text
    assert run.status()["state"] == "failed"


def test_sigterm_while_preparing_is_75_too(command, tmp_path):
    records = tmp_path / "records"
    process = command.start("--mode=prepare", f"--config.data.tfds_dir={records}")
    command.wait_for(process, lambda: any(records.glob("histopathology/kaggle-*/lock")))
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=20)[1]
    # It may have been quicker.
    assert process.returncode in (75, 0), stderr
    assert "Traceback" not in stderr


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "events")).Reload()
    return {
        # Files of the same second are in no order.
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """An undisturbed run of three epochs of three steps."""
    config, folder = command.get_config(epochs=3), tmp_path_factory.mktemp("whole")
    histo_jax.fit(config, folder)
    history = (folder / "history.csv").read_bytes()
    return SimpleNamespace(config=config, folder=folder, history=history, curves=curves(folder))


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole.folder, tmp_path / "copy"))


@pytest.fixture
def three_epochs(command):
    return command.get_config(epochs=3)


def test_values_that_are_not_finite_stop_the_run_and_are_not_saved(three_epochs, copy, monkeypatch):
    before = {p.name for p in (copy / "checkpoints").iterdir()}
    make = steps.make_train_step

    def poisoned(*arguments):
        train_step = make(*arguments)
        calls = []

        def step(state, batch):
            calls.append(1)
            if len(calls) == 4:
                batch = batch | {"label": batch["label"] * np.nan}
            return train_step(state, batch)

        return step

    monkeypatch.setattr(steps, "make_train_step", poisoned)
    three_epochs.fit.epochs = 5
    three_epochs.checkpoint.every_minutes = 1e-9  # a save is due at every step
    with pytest.raises(UserError, match=r"step 13 is not finite.*learning_rate") as error:
        histo_jax.fit(three_epochs, copy)
    # Step 12, before it, was finite and was saved.
    after = {p.name for p in (copy / "checkpoints").iterdir()}
    assert max(map(int, after)) == 12
    assert after - before <= {"10", "11", "12"}
    prepared = histo_jax.prepare(three_epochs)
    subsets = splits.make_subsets(prepared.tables, three_epochs.data, three_epochs.data_seed)
    positions = loader.training_order(len(subsets.train.rows), 8, three_epochs.seed)[12]
    for name in prepared.tables["train"]["id"].iloc[subsets.train.rows[positions]]:
        assert name in str(error.value)
    assert Workdir(copy).status()["state"] == "failed"


def test_a_run_stopped_inside_an_epoch_ends_with_the_same_bytes(
    whole, three_epochs, tmp_path, monkeypatch
):
    """The first stop is in the epoch on the patches' centres, the second after it."""
    real = signals.requested
    calls = []

    def after(steps):
        calls.append(1)
        return len(calls) > steps or real()

    # 3 steps an epoch: stops after step 2 of 9, then after 5 more, then runs to its end. The
    # placement of the pixels is not part of a run.
    for steps_before, placement in ((1, "device"), (4, "disk")):
        three_epochs.data.placement = placement
        calls.clear()
        monkeypatch.setattr(signals, "requested", lambda count=steps_before: after(count))
        with pytest.raises(signals.Preempted):
            histo_jax.fit(three_epochs, tmp_path)
    monkeypatch.undo()
    three_epochs.data.placement = "host"
    histo_jax.fit(three_epochs, tmp_path)
    assert (tmp_path / "history.csv").read_bytes() == whole.history


def test_preempted_in_validation_is_saved_and_validated_later(
    whole, three_epochs, tmp_path, monkeypatch
):
    three_epochs.data.placement = "disk"  # the others also check while they load

    def stopping(batches):
        next(batches)
        raise signals.Preempted("now")

    monkeypatch.setattr(signals, "stopping", stopping)
    with pytest.raises(signals.Preempted, match="saved at step 3"):
        histo_jax.fit(three_epochs, tmp_path)
    monkeypatch.undo()
    histo_jax.fit(three_epochs, tmp_path)
    assert (tmp_path / "history.csv").read_bytes() == whole.history
    assert curves(tmp_path) == whole.curves


def test_derived_files_agree_with_the_checkpoints_after_any_kill(whole, three_epochs, copy):
    assert [step for step, _ in whole.curves["gradient_norm"]] == [3, 6, 9]
    # As if each had been written before, or after, the newest checkpoint was complete.
    shutil.rmtree(copy / "events")
    (copy / "history.csv").write_bytes(whole.history + b"4,12,0.1,0.1,0.1,0.1\n")
    Workdir(copy).update_status(step=3)
    histo_jax.fit(three_epochs, copy)
    assert (copy / "history.csv").read_bytes() == whole.history
    assert curves(copy) == whole.curves
    assert Workdir(copy).status()["step"] == 9
    # The save of the last epoch was not complete: the epoch is repeated, and nothing is duplicated.
    shutil.rmtree(copy / "checkpoints" / "9")
    (copy / "status.json").write_text("")
    histo_jax.fit(three_epochs, copy)
    assert (copy / "history.csv").read_bytes() == whole.history
    assert curves(copy) == whole.curves
    assert Workdir(copy).status()["step"] == 9


def test_a_notebooks_interrupt_saves_and_the_next_call_resumes(
    whole, three_epochs, tmp_path, monkeypatch
):
    """SIGINT with Python's own handler, in the middle of the first epoch."""
    make = steps.make_train_step

    def interrupted(*arguments):
        train_step, calls = make(*arguments), []

        def step(state, batch):
            calls.append(1)
            if len(calls) == 1:
                signal.raise_signal(signal.SIGINT)
            return train_step(state, batch)

        return step

    monkeypatch.setattr(steps, "make_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted, saved at step [23];"):
        histo_jax.fit(three_epochs, tmp_path)
    monkeypatch.undo()
    status = Workdir(tmp_path).status()
    assert status["state"] == "failed"
    assert status["reason"].startswith("interrupted, saved at step")
    assert 0 < status["step"] < 4
    histo_jax.fit(three_epochs, tmp_path)
    assert (tmp_path / "history.csv").read_bytes() == whole.history


@pytest.mark.parametrize("harm", ["truncated", "missing part", "half a directory"])
def test_a_corrupt_newest_checkpoint_is_quarantined_and_the_one_before_resumes(
    whole, three_epochs, copy, log, harm
):
    newest = copy / "checkpoints" / "9"
    if harm == "truncated":
        # The copies in the folders of processes are not read.
        victim = max((newest / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:100])
    elif harm == "missing part":
        shutil.rmtree(newest / "state")
    else:
        for path in sorted(newest.iterdir())[::2]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    histo_jax.fit(three_epochs, copy)
    assert "checkpoint 9 is corrupt and was moved to" in log.text
    assert "resumed from step 6" in log.text
    assert [path.name.partition("-")[0] for path in (copy / "quarantined").iterdir()] == ["9"]
    assert (copy / "history.csv").read_bytes() == whole.history
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.best_step() in (3, 6, 9)


def test_a_second_interrupt_from_python_raises_at_once_and_none_is_lost():
    with signals.watch():
        signal.raise_signal(signal.SIGINT)
        assert signals.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signals._received = 0  # dealt with here
    # One that comes after the last point to stop at.
    with pytest.raises(KeyboardInterrupt, match="after the command had finished"), signals.watch():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not signals.requested()


def test_an_interrupt_handler_of_the_users_own_is_left_alone():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        with signals.watch():
            signal.raise_signal(signal.SIGINT)
            assert not signals.requested()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [1]


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_closed_terminal_counts_as_preemption_unless_nohup_ignores_it(is_ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        with signals.watch(ctrl_c=True):
            for _ in range(2):  # from the kernel, and from the shell: no second wish to leave
                signal.raise_signal(signal.SIGHUP)
            assert signals.requested() != is_ignored
            if not is_ignored:
                assert signals.Preempted().code == 75
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_of_the_users_own_trains_and_hears_no_signal():
    handlers = []

    def work():
        with signals.watch():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)],
        check=False, capture_output=True,
    ).returncode  # fmt: skip
    if not mounted:
        message = "a small file system can be mounted by root only"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_loses_nothing(small_disk, command):
    run, config = small_disk / "run", command.get_config(epochs=1, steps=5)
    config.fit.crop_epochs = 0
    histo_jax.fit(config, run)
    history = (run / "history.csv").read_bytes()
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8 * 1024))
    options = ["--mode=fit", "--config.fit.steps_per_epoch=5", "--config.fit.epochs=3"]
    options.append("--config.fit.crop_epochs=0")
    process = command.start(*options, f"--workdir={run}")
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 2, stderr
    assert "No space left on device" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    (small_disk / "filler").unlink()
    assert (run / "history.csv").read_bytes().startswith(history[:60])
    config.fit.epochs = 3
    assert len(histo_jax.fit(config, run)) == 3
    assert json.loads((run / "status.json").read_text())["state"] == "complete"


def test_preparing_on_a_full_disk_is_one_line(small_disk, command):
    (small_disk / "filler").write_bytes(b"x" * 2_500_000)
    process = command.start("--mode=prepare", f"--config.data.tfds_dir={small_disk / 'records'}")
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 2, stderr
    assert "No space left on device" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert not list((small_disk / "records").rglob("prepared.json"))
