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


def test_all_checks_pass_on_this_machine():
    done = run(XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.split()[0] in ("PASS", "WARN") for line in lines)
    for words in ("Python", "jax", "memory free", "can be written", "devices", "sum over all 2"):
        assert any(words in line for line in lines), words


def test_invalid_arguments_fail_with_the_fix():
    done = run("--multihost=manual")
    assert done.returncode == 1
    *local, last = done.stdout.splitlines()
    assert last.startswith("FAIL  --multihost=manual needs --coordinator")
    # Local checks come first, because waiting for other processes may take minutes.
    assert sum("can be written" in line for line in local) == 3
    assert not any("devices" in line for line in local)
    unknown = run("--multihost=some")
    assert unknown.returncode == 2
    assert "invalid choice: 'some'" in unknown.stderr


@pytest.mark.parametrize("group", ["_LOCAL", "_DISTRIBUTED"])
def test_a_check_that_raises_is_a_failure_and_the_others_still_run(group, monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such library")
        yield

    def passing():
        yield "PASS", "works"

    for name in ("_LOCAL", "_DISTRIBUTED"):
        checks = (passing, broken, passing) if name == group else (passing,)
        monkeypatch.setattr(doctor, name, checks)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("FAIL  broken: RuntimeError: no such library: run launch/install.sh") == 1
    assert lines.count("PASS  works") == 3


def test_a_tpu_that_jax_does_not_use_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_DEV", tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").write_text("")
    assert next(doctor._devices())[0] == "WARN"
    assert next(doctor._driver()) == ("PASS", "no NVIDIA driver, no GPU expected")
    for chip in ("accel0", "vfio/0"):
        (tmp_path / chip).write_text("")
        verdict, text = next(doctor._devices())
        assert verdict == "FAIL"
        assert text.endswith(f"there is a TPU ({tmp_path / chip}): run launch/install.sh tpu")
        assert next(doctor._driver()) == ("PASS", f"TPU: {tmp_path / chip}")
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the installation may be fine
        verdict, text = next(doctor._devices())
        assert verdict == "WARN"
        assert text.endswith(": unset JAX_PLATFORMS=cpu to use the accelerator")
        monkeypatch.delenv("JAX_PLATFORMS")
        (tmp_path / chip).unlink()


@pytest.mark.parametrize("free", [None, 1_000_000_000])
def test_little_device_memory_is_a_warning_with_the_fix(free, monkeypatch):
    monkeypatch.setattr(memory, "free_on_devices", lambda devices: free)
    _, (verdict, text) = doctor._devices()
    assert verdict == "WARN"
    assert text.endswith("lower --config.fit.batch_size and set --config.data.placement=host")


def test_little_disk_space_is_a_warning_with_the_fix(monkeypatch):
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=11_000_000_000)
    )
    results = list(doctor._folders())
    for (verdict, text), setting in zip(
        results, ("--config.data.tfds_dir", "XDG_CACHE_HOME", "--workdir"), strict=True
    ):
        assert verdict == "WARN"
        assert text.endswith(
            f"11 GB free: free some space, or choose another folder with {setting}"
        )


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    results = list(doctor._folders())
    assert [verdict for verdict, text in results if str(tmp_path / "file") in text] == ["FAIL"]


def test_another_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 2))
    assert next(doctor._python()) == (
        "FAIL",
        "Python 3.10.2: 3.11 to 3.13 is required; PYTHON=/path/to/python launch/install.sh",
    )


def test_a_user_without_home_folder_gets_a_warning(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(doctor.Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    results = list(doctor._folders())
    for (verdict, text), setting in zip(
        results[:2], ("--config.data.tfds_dir", "XDG_CACHE_HOME"), strict=True
    ):
        assert verdict == "WARN"
        assert text == f"this user has no home folder: choose a folder with {setting}"


@pytest.mark.parametrize(
    ("variable", "value"), [("JAX_PLATFORMS", "cuba"), ("XLA_FLAGS", "--xla_no_such_flag")]
)
def test_a_variable_that_keeps_jax_from_starting_is_named(variable, value):
    done = run(**{variable: value})
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("FAIL  ")
    assert f"{variable}={value}" in last
    assert "install" not in last
