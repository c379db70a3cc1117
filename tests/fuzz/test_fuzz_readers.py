"""A small share of the fuzzing, and that it finds what is planted."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_readers.py")


def fuzz(folder: Path, *args: str, plant: str = "pass") -> tuple[int, str]:
    """Runs the script after `plant`; in a process of its own, which has no threads and may fork."""
    code = (
        "import os, runpy, sys, time\nfrom histo_jax.data.sources import kaggle\n"
        f"def plant(path):\n    {plant}\n    return 'is damaged'\n"
        + ("" if plant == "pass" else "kaggle._read_image = plant\n")
        + "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(SCRIPT), "--findings", str(folder), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_a_share(tmp_path: Path) -> None:
    status, output = fuzz(tmp_path, "--inputs", "300")
    assert status == 0, output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        ("raise KeyError(7)", "KeyError: 7"),
        ("return 'two\\nlines'", "two"),
        ("os.abort()", "crash, status -6"),
        ("time.sleep(99)", "hangs: more than 2.0 s"),
        ("bytearray(600 << 20)", "takes 6"),
    ],
)
def test_planted_bugs_are_found(tmp_path: Path, plant: str, words: str) -> None:
    seconds = "2" if "sleep" in plant else "60"
    args = ("--kinds", "kaggle.tif", "--seconds", seconds, "--inputs", "1")
    status, output = fuzz(tmp_path, *args, plant=plant)
    (saved,) = tmp_path.iterdir()
    assert status == 1, output
    assert words in output
    assert f"--replay {saved}" in output


def test_replay(tmp_path: Path) -> None:
    fuzz(tmp_path, "--kinds", "kaggle.tif", "--inputs", "1", plant="raise KeyError(7)")
    (saved,) = tmp_path.iterdir()
    status, output = fuzz(tmp_path, "--replay", str(saved), plant="raise KeyError(7)")
    assert status == 1
    assert "KeyError: 7" in output
    assert fuzz(tmp_path, "--replay", str(saved))[0] == 0
