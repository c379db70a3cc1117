import subprocess
import sys

import pytest

from histo_jax import doctor


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "histo_jax.doctor", *arguments],
        text=True, capture_output=True, check=False,
    )  # fmt: skip


def test_every_line_is_a_verdict_and_this_machine_is_well():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.split()[0] in ("PASS", "WARN") for line in lines)
    for words in ("Python", "jax", "memory free", "can be written", "devices", "a sum over all 4"):
        assert any(words in line for line in lines), words


def test_what_cannot_work_fails_with_the_remedy():
    done = run("--multihost=manual")
    assert done.returncode == 1
    assert done.stdout.startswith("FAIL  --multihost=manual needs --coordinator")
    unknown = run("--multihost=some")
    assert unknown.returncode == 2
    assert "invalid choice: 'some'" in unknown.stderr


@pytest.mark.parametrize("check", range(len(doctor._CHECKS)))
def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(check, monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such library")
        yield

    checks = [lambda: iter([("PASS", "well")])] * len(doctor._CHECKS)
    checks[check] = broken
    monkeypatch.setattr(doctor, "_CHECKS", checks)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[check] == "FAIL  broken: RuntimeError: no such library: run launch/install.sh"
    assert len(lines) == len(checks)


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = list(doctor._folders())
    assert [verdict for verdict, said in found if str(tmp_path / "file") in said] == ["FAIL"]


def test_another_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 2))
    assert next(doctor._python()) == (
        "FAIL", "Python 3.10.2: use 3.11 to 3.13, PYTHON=/path/to/python launch/install.sh",
    )  # fmt: skip
