"""The memory of a map does not grow with the slide."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("tifffile", reason="the extra slides is not installed")


@pytest.mark.slow
def test_a_large_slide_takes_bounded_memory(tmp_path, monkeypatch):
    """60,000 x 60,000 pixels, mostly glass; the command runs in a process of its own."""
    monkeypatch.delenv("XLA_FLAGS")  # the tests' four devices hold blocks and programs of their own
    benchmark = runpy.run_path(str(Path(__file__).with_name("slides.py")))
    path = tmp_path / "large.tif"
    slide = benchmark["write_slide"](path, benchmark["LARGE"], benchmark["TISSUE"])
    run = benchmark["make_run"](tmp_path / "run", "full")
    result = benchmark["run_large"](run, slide, tmp_path / "out")
    assert result["memory"] <= 1.5e9
    assert result["cells"] > 3500
