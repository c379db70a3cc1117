"""How often a run is restarted after a lost process; the processes are simulated."""

import sys
from pathlib import Path

import jax
import pytest

from histo_jax.config import Config
from histo_jax.distributed import restarts
from histo_jax.run.workdir import Workdir


class KilledError(BaseException):
    """Ends a session as SIGKILL does: without a trace in `status.json`."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a command of two processes that ends as told; returns the status to exit with."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def command(end, checkpoint):
        run = Workdir(tmp_path)
        with run.session("fit"), restarts.track(run):
            run.acquire(Config())
            if checkpoint is not None:
                (tmp_path / "checkpoints" / str(checkpoint)).mkdir(parents=True)
            if isinstance(end, KilledError):
                monkeypatch.setattr(Workdir, "_set_state", lambda *_, **__: None)
            raise end

    def run(end, checkpoint=None):
        with pytest.raises(type(end)):
            command(end, checkpoint)
        monkeypatch.undo()
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        return restarts.exit_status(tmp_path)

    return run


LOST = jax.errors.JaxRuntimeError("INTERNAL: Gloo AllReduce failed: Connection closed by peer")
ENDS = pytest.mark.parametrize("end", [LOST, KilledError()], ids=["survives", "killed"])


@ENDS
def test_three_restarts_without_a_new_checkpoint_fail_the_run(start, end, tmp_path):
    assert [start(end) for _ in range(4)] == [75, 75, 75, 1]
    assert Workdir(tmp_path).status()["restarts_without_progress"] == 3
    # A person has restarted the run.
    assert start(end) == 75
    assert Workdir(tmp_path).status()["restarts_without_progress"] == 0


@ENDS
def test_a_new_checkpoint_resets_the_count(start, end, tmp_path):
    assert [start(end), start(end), start(end, checkpoint=5)] == [75, 75, 75]
    assert start(end) == 75
    assert Workdir(tmp_path).status()["restarts_without_progress"] == 0
    assert [start(end) for _ in range(2)] == [75, 75]
    assert start(end, checkpoint=9) == 75  # the third restart has made one


def test_an_error_of_another_kind_is_not_counted(start, tmp_path):
    for _ in range(5):
        assert start(ValueError()) == 75
    assert Workdir(tmp_path).status()["restarts_without_progress"] == 0


def test_a_single_process_counts_nothing(start, tmp_path, monkeypatch):
    start(LOST)
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    run = Workdir(tmp_path)
    with run.session("fit"), restarts.track(run):
        pass
    assert "restarts_without_progress" not in run.status()


@pytest.mark.parametrize(("status", "advice"), [(75, "restart all"), (1, "fix the error")])
def test_the_process_ends_with_one_line_that_says_what_to_do(status, advice, monkeypatch, capsys):
    monkeypatch.setattr(restarts, "exit_status", lambda _: status)
    monkeypatch.setattr(restarts.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as exit_info:
        restarts.exit_after_loss(LOST, Path("run"))
    assert exit_info.value.code == status
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("histo_jax: another process of the run was lost or failed")
    assert advice in line
