"""A short fuzzing run, and proof that planted bugs are found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_readers.py")
# One process for all runs, since the libraries take seconds to load. It has no threads, so each
# run can be a fork of it.
DRIVER = """
import importlib.util, json, os, sys, time
from histo_jax.data.sources import kaggle

spec = importlib.util.spec_from_file_location("fuzz_readers", sys.argv[1])
fuzz_readers = sys.modules["fuzz_readers"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz_readers)
results = {}
for name, (plant, args) in json.loads(sys.argv[2]).items():
    output = name + ".txt"
    child = os.fork()
    if not child:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        if plant:
            exec("def read(path):\\n    " + plant + "\\n    return 'is corrupt'")
            kaggle._read_image = read
        sys.argv = ["fuzz_readers.py", *args]
        status = fuzz_readers.main()
        sys.stdout.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results[name] = status, open(output).read()
print(json.dumps(results))
"""
BUGS = {
    "exception": ("raise KeyError(7)", "KeyError: 7"),
    "two-lines": ("return 'two\\nlines'", "two"),
    "crash": ("os.abort()", "crash, status -6"),
    "hang": ("time.sleep(99)", "hangs: more than 0.5 s"),
    "memory": ("bytearray(600 << 20)", "takes 6"),
}
INPUT = "kaggle.tif-0-0"  # kind, seed, index


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, tuple[int, str]]:
    """Returns status and output of each run, by name."""
    runs: dict[str, tuple[str, list[str]]] = {}
    runs["short"] = ("", ["--inputs", "300", "--findings", str(folder / "short")])
    for name, (plant, _) in BUGS.items():
        seconds = "0.5" if name == "hang" else "60"
        args = ["--kinds", "kaggle.tif", "--seconds", seconds, "--inputs", "1"]
        runs[name] = (plant, [*args, "--findings", str(folder / name)])
    replay = ["--replay", str(folder / "exception" / INPUT)]
    runs["replay"] = (BUGS["exception"][0], replay)
    runs["replay-fixed"] = ("", replay)
    for name in runs:
        (folder / name).mkdir()
    command = [sys.executable, "-c", DRIVER, str(SCRIPT), json.dumps(runs)]
    run = subprocess.run(
        command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True, timeout=120
    )
    return json.loads(run.stdout)


def test_a_short_run_finds_nothing(folder: Path, results: dict) -> None:
    status, output = results["short"]
    assert status == 0, output
    assert not list((folder / "short").iterdir())


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(folder: Path, results: dict, name: str) -> None:
    status, output = results[name]
    (saved,) = (folder / name).iterdir()
    assert status == 1, output
    assert BUGS[name][1] in output
    assert f"--replay {saved}" in output


def test_replay(results: dict) -> None:
    status, output = results["replay"]
    assert status == 1
    assert "KeyError: 7" in output
    assert results["replay-fixed"][0] == 0
