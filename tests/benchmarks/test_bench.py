"""The benchmark in its short form: all rows run once; timings are not checked."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROWS = {
    "roofline",
    "train",
    "epoch",
    "large",
    "predict",
    "tta",
    "input",
    "images",
    "prepare",
    "start",
    "memory",
    "growth",
}
NEEDS = {
    "pytorch": ["torch"],
    "pytorch_tuned": ["torch"],
    "keras_jax": ["keras"],
    "teaching": ["torch", "cv2"],
    "pillow": ["torch"],
}
# Read files only.
WITHOUT_NETWORK = {"pillow"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    # Without the four fake devices of the tests; compiled programs are shared with the other
    # tests, unlike in a measurement.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("XLA_FLAGS")
    }
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("bench.py"),
            "--short",
            "--growth",
            f"--json={path}",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_every_row_has_finite_positive_results(run: tuple[dict, str]) -> None:
    report, table = run
    assert {result["row"] for result in report["results"]} == ROWS
    for result in report["results"]:
        numbers = [result["value"], *(result["ratio"] or ())]
        assert all(map(math.isfinite, numbers)), result
        if not result["name"].startswith("exponent"):  # may be negative at this size
            assert min(numbers) > 0, result
        assert result["name"] in table
    assert report["device"]
    assert report["cores"] > 0
    assert {"python", "jax", "flax"} <= report["versions"].keys()


def test_peers_train_the_same_network_or_are_reported_as_missing(run: tuple[dict, str]) -> None:
    report, table = run
    missing = {peer for peer, needs in NEEDS.items() if not all(map(find_spec, needs))}
    assert report["parameters"].keys() == {"histo", *NEEDS} - missing - WITHOUT_NETWORK
    assert len(set(report["parameters"].values())) == 1
    for peer in missing:
        assert "No module named" in report["skipped"][peer]
        assert f"skipped: {peer}: No module named" in table
    assert report["skipped"].keys() == missing, report["skipped"]
    if os.environ.get("CI"):
        assert not missing
