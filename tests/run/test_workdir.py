import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from histo_jax.config import Config
from histo_jax.errors import UserError
from histo_jax.run import files, signals
from histo_jax.run.saved_config import SavedConfig, plain
from histo_jax.run.workdir import Workdir
from histo_jax.settings import load_run_config


def acquire(folder):
    run = Workdir(folder)
    with run.session("fit"):
        run.acquire(Config())
    return run


def test_status_follows_the_session(tmp_path):
    run = Workdir(tmp_path)
    with run.session("fit"):
        assert run.status() == {}
        run.acquire(Config())
        assert run.status()["state"] == "running"
    with run.session("run"):
        assert (run.status()["state"], run.previous_state) == ("running", "complete")
        run.update_status(step=7)
    assert run.status() == {
        "state": "complete", "reason": None, "step": 7, "finished": ["fit", "run"],
    }  # fmt: skip
    assert run.is_finished(Config(), "run")
    assert not run.is_finished(Config(), "predict")
    changed = Config()
    changed.fit.epochs = 20
    assert not run.is_finished(changed, "run")


def test_only_the_primary_process_writes(tmp_path):
    run = Workdir(tmp_path, is_primary=False)
    with run.session("fit"):
        run.acquire(Config())
        run.write_text("a.txt", "a")
        run.update_status(step=7)
    assert list(tmp_path.iterdir()) == []
    acquire(tmp_path).write_text("a.txt", "a")
    assert (tmp_path / "a.txt").read_text() == "a"


def test_status_names_the_failure(tmp_path):
    run = acquire(tmp_path)
    with pytest.raises(OSError, match="disk"), run.session("fit"):
        raise OSError("disk full")
    status = run.status()
    assert (status["state"], status["reason"]) == ("failed", "disk full")


@pytest.mark.parametrize("ctrl_c", [True, False], ids=["terminal", "notebook"])
def test_an_interrupt_is_the_reason_of_the_status(tmp_path, ctrl_c):
    # A shell without job control starts background processes with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = acquire(tmp_path)
    ending = signals.Preempted if ctrl_c else KeyboardInterrupt
    with pytest.raises(ending, match="interrupted, saved at step 7"), signals.watch(ctrl_c=ctrl_c):  # noqa: PT012, SIM117
        with run.session("fit"):
            os.kill(os.getpid(), signal.SIGINT)
            while not signals.requested():
                time.sleep(0.001)
            raise signals.Preempted(", saved at step 7")
    assert run.status()["state"] == "failed"  # nothing restarts it by itself
    assert "rerun the command to resume" in run.status()["reason"]


def test_a_mistake_before_the_run_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="x"), Workdir(tmp_path / "new").session("run"):
        raise ValueError("x")
    assert not (tmp_path / "new").exists()


def test_a_broken_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1, "b": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1, "b": None}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text())["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_settings_come_back_and_those_of_another_version_are_refused(tmp_path):
    config = Config(seed=3)
    config.model.features = (1, 2, 3, 4, 5)
    Workdir(tmp_path).save_config(config)
    assert load_run_config(tmp_path) == config
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["seed"]
    path.write_text(json.dumps(values))
    assert load_run_config(tmp_path).seed == 0
    path.write_text(json.dumps(values | {"fit.magic": 1}))
    with pytest.raises(UserError, match=r"another version .* no setting fit\.magic"):
        load_run_config(tmp_path)
    values.pop("version")  # as 0.1.0 wrote it
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config\.json was written by histo_jax 0\.1\.0"):
        load_run_config(tmp_path)
    with pytest.raises(UserError, match=r"written by histo_jax 0\.1\.0"):
        Workdir(tmp_path).check_compatible(config)


def test_another_process_in_a_new_folder_leaves_the_first_one_alone(tmp_path):
    """Both begin before the folder is a run's; the second acquires it last."""
    run = Workdir(tmp_path)
    with run.session("run"):
        run.acquire(Config())
        run.update_status(step=7)
        second = subprocess.run(
            [sys.executable, "-c", SECOND, tmp_path], capture_output=True, text=True, check=False
        )
        assert "is in use by process" in second.stderr
        assert run.status()["state"] == "running"


SECOND = """
import sys
from pathlib import Path
from unittest import mock
from histo_jax.run.workdir import Workdir
from histo_jax.config import Config
run = Workdir(sys.argv[1])
# As it was when the second process began.
with mock.patch.object(Path, "exists", lambda path: path.name != "config.json"):
    session = run.session("run")
    session.__enter__()
try:
    run.acquire(Config())
except BaseException as error:
    print(error, file=sys.stderr)
    session.__exit__(type(error), error, None)
"""


def test_a_folder_that_became_another_run_meanwhile_is_refused(tmp_path):
    of_another = json.dumps(SavedConfig(tmp_path, plain(Config(seed=1))).to_json())
    run = Workdir(tmp_path)

    def begin():
        with run.session("fit"):
            (tmp_path / "config.json").write_text(of_another)
            files.write_json(tmp_path / "status.json", {"state": "complete"})
            run.acquire(Config())

    with pytest.raises(UserError, match="belongs to another run: seed was 1"):
        begin()
    assert (tmp_path / "config.json").read_text() == of_another
    assert run.status() == {"state": "complete"}


def test_a_second_thread_is_refused_as_a_second_process_is(tmp_path, monkeypatch):
    run = acquire(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    messages = []

    def second(folder):
        try:
            with Workdir(folder).session("fit"):
                messages.append("let in")
        except UserError as error:
            messages.append(str(error))

    with run.session("run"):
        for folder in (tmp_path / "run", tmp_path / "link", type(tmp_path)("run")):
            thread = threading.Thread(target=second, args=(folder,))
            thread.start()
            thread.join()
        second(tmp_path / "run")  # nor is a nested session let in
        assert run.status()["state"] == "running"
    assert len(messages) == 4
    assert all("is in use by another command of this process" in line for line in messages)
    second(tmp_path / "run")
    assert messages[4:] == ["let in"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_logged(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(logging.getLogger("histo_jax"), "propagate", True)
    acquire(tmp_path)
    assert f"{tmp_path} is on a file system without locks" in caplog.text
    assert Workdir(tmp_path).status()["state"] == "complete"


def test_a_lock_that_fails_names_its_file(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output") as caught:
        acquire(tmp_path)
    assert caught.value.filename == str(tmp_path / "lock")


def test_the_lock_file_of_another_user_can_be_locked(tmp_path, monkeypatch):
    (tmp_path / "lock").write_bytes(b"process 7 on caf\xe9\n")
    real = type(tmp_path).open

    def forbidden(path, mode="r", **options):
        if mode != "r" and path.name == "lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, mode, **options)

    monkeypatch.setattr(type(tmp_path), "open", forbidden)
    acquire(tmp_path)
    assert Workdir(tmp_path).status()["state"] == "complete"
    with files.open_lock(tmp_path / "lock") as other:
        files.lock(other)
        with pytest.raises(UserError, match="in use by process 7 on caf"):
            acquire(tmp_path)
    (tmp_path / "lock").unlink()
    with pytest.raises(PermissionError):
        acquire(tmp_path)
