"""Before anything else is imported: the Python, its packages, and what could hide them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from histo_jax import startup

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*words: str, folder: Path, path: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, text=True, capture_output=True, check=False,
        env={**ENVIRONMENT, "PYTHONPATH": path},
    )  # fmt: skip


@pytest.mark.parametrize("module", ["main", "doctor", "serve"])
@pytest.mark.parametrize("inside", [True, False])
def test_outside_the_environment_one_line_names_the_command(module, inside, tmp_path):
    # `-S`: without site-packages.
    done = run(
        "-S", "-m", f"histo_jax.{module}", "--help",
        folder=ROOT if inside else tmp_path, path=str(ROOT),
    )  # fmt: skip
    at = "" if inside else f"{ROOT}/"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"histo_jax: the packages are not installed for {sys.executable}: run "
        f"{at}launch/install.sh, then {at}.venv/bin/python -m histo_jax.{module}\n"
    )


def test_a_python_that_is_too_old_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(ImportError, match=r"^Python 3\.9 is too old: .* needs 3\.11 to 3\.13$"):
        startup.check()
    monkeypatch.chdir(ROOT)
    monkeypatch.delattr(sys, "orig_argv")  # as it was before 3.10
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    with pytest.raises(SystemExit, match="2"):
        startup.check()
    assert capsys.readouterr().err == (
        "histo_jax: Python 3.9 is too old: histo_jax needs 3.11 to 3.13; run "
        "launch/install.sh, then .venv/bin/python -m histo_jax.main\n"
    )


def test_no_module_of_the_current_folder_hides_a_library(tmp_path):
    for name in ("jax", "absl", "numpy", "random", "logging", "json", "tests", "configs"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}')")
    (tmp_path / "histo_jax").mkdir()  # of results
    (tmp_path / "helper.py").write_text("SEED = 7")
    (tmp_path / "mine.py").write_text(
        "import helper, histo_jax, json, jax\n"
        "def get_config():\n    config = histo_jax.Config()\n    config.seed = -helper.SEED\n"
        "    return config\n"
    )
    done = run(
        "-m", "histo_jax.main", "--config=mine.py", "--workdir=run", folder=tmp_path,
        path=str(ROOT),
    )  # fmt: skip
    assert done.stderr.startswith("histo_jax: config.seed = -7 must be ")
    assert done.returncode == 2


def test_the_library_that_cannot_be_imported_is_named(tmp_path):
    (tmp_path / "ml_collections.py").write_text("import broken_library")
    (tmp_path / "broken_library.py").write_text("raise ImportError('libfoo.so:\\nnot found')")
    done = run("-m", "histo_jax.main", "--help", folder=ROOT, path=f"{ROOT}:{tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "histo_jax: ml_collections cannot be imported (libfoo.so: not found): remove .venv, run "
        "launch/install.sh, then .venv/bin/python -m histo_jax.main\n"
    )


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("import no_such_library.part", "no_such_library"),
        ("from numpy import no_such_name", "numpy"),
        ("from histo_jax.errors import no_such_name", ""),
        ("import histo_jax.no_such_module", ""),
        ("raise ImportError('ours')", ""),
    ],
)
def test_a_bug_of_our_own_is_no_broken_library(line, named):
    def lazily() -> None:
        exec(line, {"__name__": "histo_jax.fitting"})

    with pytest.raises(ImportError) as error:
        exec("call()", {"__name__": "absl.app", "call": lazily})
    assert startup.explain(error.value).partition(" ")[0] == named


def test_a_wheel_has_no_script_to_name(monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "__file__", str(tmp_path / "histo_jax" / "startup.py"))
    error = ImportError("no", name="jax")
    assert startup.explain(error) == "jax cannot be imported (no): reinstall histo_jax with pip"
