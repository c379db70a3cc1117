"""Signals, locks, values that are not finite, full disks, damage: mostly in real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import histo_jax
from histo_jax import fitting
from histo_jax.errors import UserError
from histo_jax.run import signals, workdir
from histo_jax.training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[1]
CONFIG = """
from histo_jax.config import Config
def get_config():
    config = Config()
    config.data.source, config.data.validation_fraction = "kaggle", 0.25
    config.data.raw_dir, config.data.tfds_dir = {raw!r}, {records!r}
    config.model.features, config.model.dense = (2, 2, 2, 2, 2), 4
    config.fit.batch_size, config.fit.steps_per_epoch, config.fit.epochs = 8, 100_000, 2
    return config
"""


class Command:
    """The real command on a run that would take hours."""

    def __init__(self, folder: Path, make_kaggle) -> None:
        self.workdir, config = folder / "run", folder / "config.py"
        raw = make_kaggle(folder / "raw")
        config.write_text(CONFIG.format(raw=str(raw), records=str(folder / "records")))
        self.argv = [sys.executable, "-m", "histo_jax.main", f"--config={config}"]

    def start(self, *options: str) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        return subprocess.Popen(
            [*self.argv, f"--workdir={self.workdir}", *options],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_for(self, process: subprocess.Popen, ready) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def command(tmp_path_factory, make_kaggle):
    return Command(tmp_path_factory.mktemp("reliability"), make_kaggle)


def test_sigterm_saves_and_leaves_and_the_lock_keeps_others_out(command):
    """One long run: a second process is refused, SIGTERM saves, a dead process is told apart."""
    often = "--config.checkpoint.every_minutes=0.01"
    first = command.start("--mode=fit", often)
    saved = command.workdir / "checkpoints"
    command.wait_for(first, lambda: any(p.name.isdigit() for p in saved.glob("*")))
    # The first save is read back before the status speaks of it.
    command.wait_for(first, lambda: workdir.status(command.workdir)["step"] > 0)
    assert workdir.status(command.workdir)["state"] == "running"

    second = command.start("--mode=fit")
    said = second.communicate()[1]
    assert second.returncode == 2
    assert f"{command.workdir} is in use by process {first.pid}" in said
    assert len(said.splitlines()) == 1

    first.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said = first.communicate(timeout=60)[1]
    assert first.returncode == signals.EXIT_STATUS == 75
    assert time.monotonic() - began < 15
    assert "Traceback" not in said
    status = workdir.status(command.workdir)
    assert status["state"] == "preempted"
    assert f"preempted, saved at step {status['step']}" in said
    steps = [int(p.name) for p in saved.glob("*")]
    assert max(steps) == status["step"]

    third = command.start("--mode=fit", often)
    command.wait_for(
        third, lambda: any(p.name.isdigit() and int(p.name) > max(steps) for p in saved.glob("*"))
    )
    third.kill()
    assert f"resumed from step {status['step']}" in third.communicate()[1]
    assert workdir.status(command.workdir)["state"] == "running"  # nobody could say otherwise
    fourth = command.start("--mode=evaluate")
    said = fourth.communicate(timeout=60)[1]
    # The dead process holds nobody up, and is told from a live one.
    assert f"the last process in {command.workdir} ended without a word" in said
    assert fourth.returncode == 2
    assert "no finished epoch" in said
    assert workdir.status(command.workdir)["state"] == "failed"


def test_a_second_signal_leaves_at_once(command):
    process = command.start("--mode=fit")
    command.wait_for(process, lambda: workdir.status(command.workdir).get("state") == "running")
    # Stopped, it cannot answer the first one before the second is there.
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=20)
    assert process.returncode in (128 + signal.SIGUSR1, 128 + signal.SIGTERM)


def test_ctrl_c_is_one_line_and_goes_on(command, tmp_path):
    settings = ["--mode=fit", f"--workdir={tmp_path / 'run'}"]
    first = command.start(*settings, "--config.checkpoint.every_minutes=0.01")
    saved = tmp_path / "run" / "checkpoints"
    command.wait_for(first, lambda: any(p.name.isdigit() for p in saved.glob("*")))
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 130, said
    assert "Ctrl-C again leaves at once" in said
    assert re.search(r"histo_jax: interrupted, saved at step \d+;", said.splitlines()[-1])
    assert "Traceback" not in said
    assert workdir.status(tmp_path / "run")["state"] == "failed"
    again = command.start(*settings, "--config.fit.epochs=1", "--config.checkpoint.every_minutes=9")
    command.wait_for(again, lambda: workdir.status(tmp_path / "run")["state"] == "running")
    again.send_signal(signal.SIGTERM)
    assert "resumed from step" in again.communicate(timeout=60)[1]
    assert again.returncode == 75


def test_sigterm_while_preparing_is_75_too(command, tmp_path):
    records = tmp_path / "records"
    process = command.start("--mode=prepare", f"--config.data.tfds_dir={records}")
    command.wait_for(process, lambda: any(records.glob("histopathology/kaggle-*/lock")))
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[1]
    # It may have been quicker.
    assert process.returncode in (75, 0), said
    assert "Traceback" not in said


def test_values_that_are_not_finite_stop_the_run_and_are_not_saved(
    tiny_config, tmp_path, monkeypatch
):
    tiny_config.fit.epochs, tiny_config.fit.steps_per_epoch = 1, 6
    histo_jax.fit(tiny_config, tmp_path)
    before = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    make = fitting.steps.make_train_step

    def poisoned(*arguments):
        train_step = make(*arguments)
        calls = []

        def step(state, batch):
            calls.append(1)
            if len(calls) == 4:
                batch = batch | {"label": batch["label"] * np.nan}
            return train_step(state, batch)

        return step

    monkeypatch.setattr(fitting.steps, "make_train_step", poisoned)
    tiny_config.fit.epochs = 4
    tiny_config.checkpoint.every_minutes = 1e-9  # a save is due at every step
    with pytest.raises(UserError, match=r"step 10 is not finite.*learning_rate") as error:
        histo_jax.fit(tiny_config, tmp_path)
    # Step 9, before it, was good and was saved.
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == before | {"9"}
    prepared = histo_jax.prepare(tiny_config)
    subsets = fitting.splits.make_subsets(prepared.tables, tiny_config.data, tiny_config.data_seed)
    chosen = fitting.loader.training_order(len(subsets.train.rows), 8, tiny_config.seed)[9]
    for name in prepared.tables["train"]["id"].iloc[subsets.train.rows[chosen]]:
        assert name in str(error.value)
    assert workdir.status(tmp_path)["state"] == "failed"


def test_a_run_stopped_inside_an_epoch_ends_with_the_same_bytes(tiny_config, tmp_path, monkeypatch):
    tiny_config.fit.epochs = 3
    histo_jax.fit(tiny_config, tmp_path / "whole")
    real = signals.requested
    asked = []

    def after(steps):
        asked.append(1)
        return len(asked) > steps or real()

    # 3 steps an epoch: stops after step 2 of 9, then after 5 more, then runs to its end. Where the
    # pixels lie is no part of a run.
    for steps, placement in ((1, "device"), (4, "disk")):
        tiny_config.data.placement = placement
        asked.clear()
        monkeypatch.setattr(fitting.signals, "requested", lambda steps=steps: after(steps))
        with pytest.raises(signals.Preempted):
            histo_jax.fit(tiny_config, tmp_path / "stopped")
    monkeypatch.undo()
    tiny_config.data.placement = "host"
    histo_jax.fit(tiny_config, tmp_path / "stopped")
    one, other = ((tmp_path / n / "history.csv").read_bytes() for n in ("whole", "stopped"))
    assert one == other


def test_preempted_in_validation_is_saved_and_validated_later(tiny_config, tmp_path, monkeypatch):
    tiny_config.fit.epochs = 2
    tiny_config.data.placement = "disk"  # the others also ask while they load
    histo_jax.fit(tiny_config, tmp_path / "whole")

    def stopped(batches):
        next(batches)
        raise signals.Preempted("now")

    monkeypatch.setattr(fitting.signals, "stopping", stopped)
    with pytest.raises(signals.Preempted, match="saved at step 3"):
        histo_jax.fit(tiny_config, tmp_path / "stopped")
    monkeypatch.undo()
    histo_jax.fit(tiny_config, tmp_path / "stopped")
    one, other = ((tmp_path / n / "history.csv").read_bytes() for n in ("whole", "stopped"))
    assert one == other
    assert curves(tmp_path / "whole") == curves(tmp_path / "stopped")


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "events")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_what_a_kill_left_beside_the_checkpoints_is_made_to_agree_with_them(tiny_config, tmp_path):
    histo_jax.fit(tiny_config, tmp_path)
    whole, wanted = (tmp_path / "history.csv").read_bytes(), curves(tmp_path)
    assert [step for step, _ in wanted["gradient_norm"]] == [3, 6]
    # As if each had been written before, or after, the newest checkpoint was whole.
    shutil.rmtree(tmp_path / "events")
    (tmp_path / "history.csv").write_bytes(whole + b"3,9,0.1,0.1,0.1,0.1\n")
    workdir.update_status(tmp_path, step=3)
    histo_jax.fit(tiny_config, tmp_path)
    assert (tmp_path / "history.csv").read_bytes() == whole
    assert curves(tmp_path) == wanted
    assert workdir.status(tmp_path)["step"] == 6
    # The epoch's save was not whole: it is taken once more, and nothing is there twice.
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    (tmp_path / "status.json").write_text("")
    histo_jax.fit(tiny_config, tmp_path)
    assert (tmp_path / "history.csv").read_bytes() == whole
    assert curves(tmp_path) == wanted
    assert workdir.status(tmp_path)["step"] == 6


def test_a_notebooks_interrupt_saves_and_the_next_call_goes_on(tiny_config, tmp_path, monkeypatch):
    """SIGINT with Python's own handler, in the middle of the first epoch."""
    tiny_config.fit.epochs, tiny_config.fit.steps_per_epoch = 1, 8
    histo_jax.fit(tiny_config, tmp_path / "whole")
    make = fitting.steps.make_train_step

    def interrupted(*arguments):
        train_step, calls = make(*arguments), []

        def step(state, batch):
            calls.append(1)
            if len(calls) == 1:
                signal.raise_signal(signal.SIGINT)
            return train_step(state, batch)

        return step

    monkeypatch.setattr(fitting.steps, "make_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted, saved at step [2-5];"):
        histo_jax.fit(tiny_config, tmp_path / "stopped")
    monkeypatch.undo()
    status = workdir.status(tmp_path / "stopped")
    assert status["state"] == "failed"
    assert status["reason"].startswith("interrupted, saved at step")
    assert 0 < status["step"] < 8
    histo_jax.fit(tiny_config, tmp_path / "stopped")
    one, other = ((tmp_path / n / "history.csv").read_bytes() for n in ("whole", "stopped"))
    assert one == other


def test_a_second_interrupt_from_python_raises_at_once_and_none_is_lost():
    with signals.watch():
        signal.raise_signal(signal.SIGINT)
        assert signals.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signals._received = 0  # dealt with here
    # One that comes after the last point to stop at.
    with pytest.raises(KeyboardInterrupt, match="when all was done"), signals.watch():
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
    seen = []

    def work():
        with signals.watch():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


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
    run = small_disk / "run"
    settings = ["--mode=fit", "--config.fit.steps_per_epoch=5", f"--workdir={run}"]
    done = command.start(*settings, "--config.fit.epochs=1")
    assert done.wait(120) == 0, done.communicate()
    history = (run / "history.csv").read_bytes()
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8 * 1024))
    full = command.start(*settings, "--config.fit.epochs=3")
    said = full.communicate(timeout=120)[1]
    assert full.returncode == 2, said
    assert "No space left on device" in said.splitlines()[-1]
    assert "Traceback" not in said
    (small_disk / "filler").unlink()
    assert (run / "history.csv").read_bytes().startswith(history[:60])
    again = command.start(*settings, "--config.fit.epochs=3")
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0, said
    assert "resumed from step" in said
    assert json.loads((run / "status.json").read_text())["state"] == "complete"


def test_preparing_on_a_full_disk_is_one_line(small_disk, command):
    (small_disk / "filler").write_bytes(b"x" * 2_500_000)
    process = command.start("--mode=prepare", f"--config.data.tfds_dir={small_disk / 'records'}")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2, said
    assert "No space left on device" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not list((small_disk / "records").rglob("prepared.json"))


@pytest.mark.parametrize("harm", ["truncated", "missing part", "half a directory"])
def test_a_damaged_newest_checkpoint_through_the_command_line(command, tmp_path, harm):
    settings = ["--mode=fit", "--config.fit.steps_per_epoch=3", f"--workdir={tmp_path / 'run'}"]
    first = command.start(*settings, "--config.fit.epochs=2")
    assert first.wait(120) == 0
    newest = tmp_path / "run" / "checkpoints" / "6"
    if harm == "truncated":
        victim = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:100])
    elif harm == "missing part":
        shutil.rmtree(newest / "state")
    else:
        for path in sorted(newest.iterdir())[::2]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    process = command.start(*settings, "--config.fit.epochs=2")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "checkpoint 6 is damaged and was put aside" in said
    assert "resumed from step 3" in said
    assert list((tmp_path / "run" / "damaged").iterdir())
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.best_step() in (3, 6)
