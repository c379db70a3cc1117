"""A small share of `chaos.py`; the long form is run by hand."""

import subprocess
import sys
from pathlib import Path


def test_a_run_that_is_killed_repeatedly_ends_as_an_undisturbed_one():
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("chaos.py"),
         "--kills=4", "--terms=1", "--predictions=1", "--epochs=2", "--fork"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
