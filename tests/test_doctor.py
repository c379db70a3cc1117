import os
import subprocess
import sys
import types

import pytest

from histo_jax import doctor
from histo_jax.distributed import memory


def run(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "histo_jax.doctor", *arguments],
        env=os.environ | variables,
        text=True,
        capture_output=True,
        check=False,
    )


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
    *alone, last = done.stdout.splitlines()
    assert last.startswith("FAIL  --multihost=manual needs --coordinator")
    # What needs no other process has been said by then: these may not answer for minutes.
    assert sum("can be written" in line for line in alone) == 3
    assert not any("devices" in line for line in alone)
    unknown = run("--multihost=some")
    assert unknown.returncode == 2
    assert "invalid choice: 'some'" in unknown.stderr


@pytest.mark.parametrize("place", ["_ALONE", "_TOGETHER"])
def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(place, monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such library")
        yield

    def well():
        yield "PASS", "well"

    for name in ("_ALONE", "_TOGETHER"):
        monkeypatch.setattr(doctor, name, (well, broken, well) if name == place else (well,))
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("FAIL  broken: RuntimeError: no such library: run launch/install.sh") == 1
    assert lines.count("PASS  well") == 3


def test_a_tpu_that_jax_does_not_see_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_DEV", tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").write_text("")
    assert next(doctor._devices())[0] == "WARN"
    assert next(doctor._driver()) == ("PASS", "no NVIDIA driver, so no GPU is expected")
    for chip in ("accel0", "vfio/0"):
        (tmp_path / chip).write_text("")
        verdict, said = next(doctor._devices())
        assert verdict == "FAIL"
        assert said.endswith(f"there is a TPU ({tmp_path / chip}): run launch/install.sh tpu")
        assert next(doctor._driver()) == ("PASS", f"TPU: {tmp_path / chip}")
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # nothing is to be installed
        verdict, said = next(doctor._devices())
        assert verdict == "WARN"
        assert said.endswith("as JAX_PLATFORMS=cpu may have it: unset that to use the accelerator")
        monkeypatch.delenv("JAX_PLATFORMS")
        (tmp_path / chip).unlink()


@pytest.mark.parametrize("free", [None, 1_000_000_000])
def test_little_memory_on_the_devices_has_a_remedy(free, monkeypatch):
    monkeypatch.setattr(memory, "free_on_devices", lambda devices: free)
    _, (verdict, said) = doctor._devices()
    assert verdict == "WARN"
    assert said.endswith("lower --config.fit.batch_size and set --config.data.placement=host")


def test_little_room_has_a_remedy(monkeypatch):
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=11_000_000_000)
    )
    found = list(doctor._folders())
    for (verdict, said), setting in zip(
        found, ("--config.data.tfds_dir", "XDG_CACHE_HOME", "--workdir"), strict=True
    ):
        assert verdict == "WARN"
        assert said.endswith(f"11 GB free: make room, or choose another folder by {setting}")


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = list(doctor._folders())
    assert [verdict for verdict, said in found if str(tmp_path / "file") in said] == ["FAIL"]


def test_another_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 2))
    assert next(doctor._python()) == (
        "FAIL",
        "Python 3.10.2: use 3.11 to 3.13, PYTHON=/path/to/python launch/install.sh",
    )


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(doctor.Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    found = list(doctor._folders())
    for (verdict, said), setting in zip(
        found[:2], ("--config.data.tfds_dir", "XDG_CACHE_HOME"), strict=True
    ):
        assert verdict == "WARN"
        assert said == f"this user has no home folder: set {setting} to another one"


@pytest.mark.parametrize(
    ("variable", "value"), [("JAX_PLATFORMS", "cuba"), ("XLA_FLAGS", "--xla_no_such_flag")]
)
def test_a_variable_that_keeps_jax_from_starting_is_named_not_the_installation(variable, value):
    done = run(**{variable: value})
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("FAIL  ")
    assert f"{variable}={value}" in last
    assert "install" not in last
