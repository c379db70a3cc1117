"""WSInfer itself applies an exported network to a slide."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import histo_jax
from histo_jax.metrics import Calibration

# Runs WSInfer without its hub, which it asks for a list of models when it is imported.
OFFLINE = """
import types, wsinfer_zoo.client as client
client.load_registry = lambda *_, **__: types.SimpleNamespace(models={})
from wsinfer.cli.cli import cli
cli()
"""
# Writes the windows of a table, cut from level 0.
CUT = """
import sys, numpy, openslide, pandas
from PIL import Image
slide, table = openslide.OpenSlide(sys.argv[1]), pandas.read_csv(sys.argv[2])
numpy.save(sys.argv[3], [
    numpy.asarray(
        slide.read_region((int(row.minx), int(row.miny)), 0, (int(row.width), int(row.height)))
        .convert("RGB").resize((96, 96), Image.Resampling.BILINEAR)
    )
    for row in table.itertuples()
])
"""


@pytest.mark.wsinfer
def test_wsinfer_and_the_predictor_agree_on_a_slide(tmp_path, sample, make_tiny_config, save_run):
    python = os.environ.get("HISTO_JAX_WSINFER")
    if not python:
        pytest.skip("HISTO_JAX_WSINFER names no Python that has WSInfer")
    config = make_tiny_config()
    config.export.formats = "torchscript"
    run = save_run(config, tmp_path / "run", Calibration(3.0, 0.2, 0.5))
    model = histo_jax.export(config, run) / "wsinfer"
    slides, results = tmp_path / "slides", tmp_path / "results"
    slides.mkdir()
    (slides / "slide.svs").symlink_to(sample / "slides" / "wsi" / "cmu-1-small-region.svs")

    def call(code, *arguments):
        command = [python, "-c", code, *map(str, arguments)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr

    call(
        OFFLINE, "--backend", "openslide", "run", "-i", slides, "-o", results, "-n", "1",
        "-c", model / "config.json", "-p", model / "torchscript_model.pt",
    )  # fmt: skip
    (table,) = Path(results / "model-outputs-csv").glob("*.csv")
    call(CUT, slides / "slide.svs", table, tmp_path / "windows.npy")
    expected = histo_jax.load(run)(np.load(tmp_path / "windows.npy"))
    assert len(expected) == 73
    np.testing.assert_allclose(pd.read_csv(table)["prob_tumor"], expected, atol=1e-5)
