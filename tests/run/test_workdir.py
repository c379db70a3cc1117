import errno
import fcntl
import json
import os
import subprocess
import sys
import threading

import pytest

from histo_jax.config import Config
from histo_jax.errors import UserError
from histo_jax.run import files, workdir


def claim(folder):
    with workdir.session(folder, "fit"):
        workdir.acquire(folder, Config())


def test_status_follows_the_outermost_mode(tmp_path):
    claim(tmp_path)
    with workdir.session(tmp_path, "run"):
        with workdir.session(tmp_path, "fit"):
            assert workdir.status(tmp_path)["state"] == "running"
        assert workdir.status(tmp_path)["state"] == "running"
        workdir.update_status(tmp_path, step=7)
    assert workdir.status(tmp_path) == {
        "state": "complete", "reason": None, "step": 7, "finished": ["fit", "run"],
    }  # fmt: skip
    assert workdir.is_finished(tmp_path, Config(), "run")
    assert not workdir.is_finished(tmp_path, Config(), "predict")
    changed = Config()
    changed.fit.epochs = 20
    assert not workdir.is_finished(tmp_path, changed, "run")


def test_status_names_the_failure(tmp_path):
    claim(tmp_path)
    with pytest.raises(OSError, match="disk"), workdir.session(tmp_path, "fit"):
        raise OSError("disk full")
    status = workdir.status(tmp_path)
    assert (status["state"], status["reason"]) == ("failed", "disk full")


def test_a_mistake_before_the_run_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="x"), workdir.session(tmp_path / "new", "run"):
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
    workdir.save_config(tmp_path, config)
    assert workdir.load_config(tmp_path) == config
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["seed"]
    path.write_text(json.dumps(values))
    assert workdir.load_config(tmp_path).seed == 0
    path.write_text(json.dumps(values | {"fit.magic": 1}))
    with pytest.raises(UserError, match=r"another version .* holds fit\.magic"):
        workdir.load_config(tmp_path)


def test_another_process_in_a_new_folder_leaves_the_first_one_alone(tmp_path):
    """Both begin before the folder is a run's; the second comes to claim it last."""
    with workdir.session(tmp_path, "run"):
        workdir.acquire(tmp_path, Config())
        workdir.update_status(tmp_path, state="running", step=7)
        second = subprocess.run(
            [sys.executable, "-c", SECOND, tmp_path], capture_output=True, text=True, check=False
        )
        assert "is in use by process" in second.stderr
        assert workdir.status(tmp_path)["state"] == "running"


SECOND = """
import sys
from pathlib import Path
from unittest import mock
from histo_jax.run import workdir
from histo_jax.config import Config
folder = Path(sys.argv[1])
# As it was when the second process began.
with mock.patch.object(Path, "exists", lambda path: path.name != "config.json"):
    tracked = workdir.session(folder, "run")
    tracked.__enter__()
try:
    workdir.acquire(folder, Config())
except BaseException as error:
    print(error, file=sys.stderr)
    tracked.__exit__(type(error), error, None)
"""


def test_a_folder_that_became_another_run_meanwhile_is_refused(tmp_path):
    of_another = json.dumps(workdir.plain(Config(seed=1)))

    def begin():
        with workdir.session(tmp_path, "fit"):
            (tmp_path / "config.json").write_text(of_another)
            files.write_json(tmp_path / "status.json", {"state": "complete"})
            workdir.acquire(tmp_path, Config())

    with pytest.raises(UserError, match="belongs to another run: seed was 1"):
        begin()
    assert (tmp_path / "config.json").read_text() == of_another
    assert workdir.status(tmp_path) == {"state": "complete"}


def test_a_second_thread_is_refused_as_a_second_process_is(tmp_path, monkeypatch):
    claim(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    said = []

    def second(folder):
        try:
            with workdir.session(folder, "fit"):
                said.append("let in")
        except UserError as error:
            said.append(str(error))

    with workdir.session(tmp_path / "run", "run"):
        for folder in (tmp_path / "run", tmp_path / "link", type(tmp_path)("run")):
            thread = threading.Thread(target=second, args=(folder,))
            thread.start()
            thread.join()
        with workdir.session(type(tmp_path)("run"), "fit"):  # nested, by another spelling
            pass
        assert workdir.status(tmp_path / "run")["state"] == "running"
    assert len(said) == 3
    assert all("is in use by another thread of this process" in line for line in said)
    second(tmp_path / "run")
    assert said[3:] == ["let in"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(workdir.log, "propagate", True)
    claim(tmp_path)
    assert f"{tmp_path} is on a file system without locks" in caplog.text
    assert workdir.status(tmp_path)["state"] == "complete"


def test_a_lock_that_fails_names_its_file(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output") as caught:
        claim(tmp_path)
    assert caught.value.filename == str(tmp_path / "lock")


def test_the_lock_file_of_another_user_can_be_locked(tmp_path, monkeypatch):
    (tmp_path / "lock").write_bytes(b"process 7 on caf\xe9\n")
    real = type(tmp_path).open

    def forbidden(path, mode="r", **options):
        if mode != "r" and path.name == "lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, mode, **options)

    monkeypatch.setattr(type(tmp_path), "open", forbidden)
    claim(tmp_path)
    assert workdir.status(tmp_path)["state"] == "complete"
    with files.open_lock(tmp_path / "lock") as other:
        files.lock(other)
        with pytest.raises(UserError, match="in use by process 7 on caf"):
            claim(tmp_path)
    (tmp_path / "lock").unlink()
    with pytest.raises(PermissionError):
        claim(tmp_path)
