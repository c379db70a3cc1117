"""The memory of a map does not grow with the slide."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("tifffile", reason="the extra slides is not installed")


@pytest.mark.slow
def test_a_large_slide_takes_bounded_memory(tmp_path):
    """60,000 x 60,000 pixels, mostly glass; the command runs in a process of its own."""
    path = Path(__file__).with_name("slides.py")
    spec = importlib.util.spec_from_file_location("slides_benchmark", path)
    slides = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slides)
    slide = slides.write_slide(tmp_path / "large.tif", slides.LARGE, slides.TISSUE)
    run = slides.make_run(tmp_path / "run", "full")
    result = slides.run_large(run, slide, tmp_path / "out")
    assert result["memory"] <= 1.5e9
    assert result["cells"] > 3500
