"""Speed and memory of whole-slide inference, for docs/slides.md.

    .venv/bin/python tests/benchmarks/slides.py [ROUNDS]

For the network of configs/quickstart.py and for the full-size one, both untrained: cells a second
of a slide that is all tissue, and images a second of the predictor on the same windows in memory,
interleaved; then a slide of 60,000 x 60,000 pixels, mostly glass, in a process of its own: peak
memory above that before the package was imported, and seconds from the start to the first cell,
with compiled programs cached.
"""

import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
MPP = 0.243
TILE = 512
GLASS = 244
LARGE = 60_000
TISSUE = 16 * TILE  # one tile of the coarsest level
DENSE = 96 * 32 * 4  # nine blocks of cells
CELLS = 1024  # that the predictor gets in memory

# Runs the command in this process, and reports the first cell and the peak of the memory.
CHILD = """
import json, re, sys, time
import psutil
before = psutil.Process().memory_info().rss
from histo_jax import main
from histo_jax.wsi import probabilities
compute, first, cells = probabilities.compute, [], []
def watched(*arguments):
    *rest, on_cells = arguments
    def note(count):
        first.append(time.time() - psutil.Process().create_time())
        cells.append(count)
        on_cells(count)
    return compute(*rest, note)
probabilities.compute = watched
status = main.main(["histo_jax", *sys.argv[1:]])
# Not ru_maxrss, which begins with the memory of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
result = {"first_cell": first[0], "cells": sum(cells), "memory": peak - before}
print(json.dumps({"status": status, **result}))
"""


def main(rounds: int) -> None:
    print(f"rounds: {rounds}; load at the start: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = {
            "dense": write_slide(folder / "dense.tif", DENSE),
            "large": write_slide(folder / "large.tif", LARGE, TISSUE),
        }
        for network in ("quickstart", "full"):
            run = make_run(folder / network, network)
            for line in measure_speed(run, slides["dense"], rounds):
                print(f"{network}: {line}")
            for attempt in range(rounds):
                result = run_large(run, slides["large"], folder / f"{network}{attempt}")
                print(
                    f"{network}: peak {result['memory'] / 1e9:.2f} GB above the start, first cell "
                    f"after {result['first_cell']:.1f} s ({'cold' if not attempt else 'warm'})"
                )


def make_run(folder: Path, network: str) -> Path:
    """Saves an untrained network as the best checkpoint of a run."""
    from configs.quickstart import get_config
    from histo_jax.config import Config
    from histo_jax.metrics import Calibration
    from histo_jax.models import create_model
    from histo_jax.run.workdir import Workdir
    from histo_jax.training.checkpoints import Checkpoint, Checkpoints
    from histo_jax.training.optimizer import create_optimizer
    from histo_jax.training.state import EarlyStopping, create_state

    config = get_config() if network == "quickstart" else Config()
    config.data.mpp = 0.972
    folder.mkdir()
    Workdir(folder).save_config(config)
    statistics_of_pixels = np.full(3, 0.7), np.full(3, 0.2)
    model, optimizer = create_model(config.model), create_optimizer(config.optimizer)
    state = create_state(model, optimizer, 0, *statistics_of_pixels, 96, False)
    calibration = dataclasses.asdict(Calibration())
    data = {"fingerprint": "", "image_size": 96, "calibration": calibration}
    early_stopping = EarlyStopping.create(config.early_stopping)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(Checkpoint(state, early_stopping, data, []), 0.5)
    return folder


def write_slide(path: Path, size: int, tissue: int | None = None) -> Path:
    """Writes a square slide as scanners do: JPEG tiles and a pyramid, with a square of tissue.

    Args:
        path: of the file.
        size: in pixels of level 0.
        tissue: width of the tissue near the middle; None = everywhere.
    """
    import tifffile

    from histo_jax.data.synthetic_tissue import generate_tile

    # The tiles are JPEG already; tifffile would refuse them without a codec that it does not use.
    tifffile.TIFF.COMPRESSORS._codecs[7] = None
    image, _ = generate_tile(np.random.default_rng(0))
    coded = {}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level, factor in enumerate((1, 4, 16)):
            # Level 0 shows the generator's pixels of 1 um four times as large.
            pixels = np.asarray(Image.fromarray(image).resize((3072 // factor,) * 2))
            side = size // factor
            first, last = 0, side
            if tissue:
                first = size // 2 // tissue * tissue // factor
                last = first + tissue // factor

            def tiles(pixels=pixels, side=side, first=first, last=last) -> Iterator[bytes]:
                for top in range(0, side, TILE):
                    for left in range(0, side, TILE):
                        is_tissue = first <= top < last and first <= left < last
                        key = (pixels.shape[0], is_tissue)
                        if key not in coded:
                            coded[key] = encode(tile_of(pixels, is_tissue))
                        yield coded[key]

            file.write(
                tiles(),
                shape=(side, side, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="ycbcr",
                compression="jpeg", subsampling=(2, 2), subfiletype=int(level > 0), metadata=None,
                resolution=(1e4 / MPP / factor,) * 2, resolutionunit="CENTIMETER",
            )  # fmt: skip
    return path


def tile_of(pixels: np.ndarray, is_tissue: bool) -> np.ndarray:
    if not is_tissue:
        return np.full((TILE, TILE, 3), GLASS, np.uint8)
    repeats = -(-TILE // pixels.shape[0])
    return np.tile(pixels, (repeats, repeats, 1))[:TILE, :TILE]


def encode(tile: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=85, subsampling=2)
    return file.getvalue()


def measure_speed(run: Path, path: Path, rounds: int) -> Iterator[str]:
    """Yields cells a second, and the predictor's images a second on the same windows."""
    import histo_jax
    from histo_jax.slides import grid, reader, resolution, scaling
    from histo_jax.wsi import probabilities

    predictor = histo_jax.load(run)
    with reader.open_slide(path) as slide:
        spacing = resolution.slide_spacing(slide, None)
        # 3% off the target, so that level 0 is read and scaled, as on most scanners.
        for name, target in (("level taken as it is", 0.972), ("scaled from level 0", 0.94)):
            scale = resolution.choose_scale(slide, spacing, target)
            cells = grid.Grid(96, 32, 32, scale.full, slide.size)
            is_tissue = np.ones(cells.shape, bool)
            windows = np.stack([
                scaling.read_scaled(slide, scale, column * 32 - 32, row * 32 - 32, 96, 96)
                for row, column in np.argwhere(is_tissue)[:CELLS]
            ])  # fmt: skip
            rates: list[tuple[float, float]] = []
            for _ in range(rounds + 1):
                began = time.perf_counter()
                probabilities.compute(predictor, slide, scale, cells, is_tissue, lambda _: None)
                middle = time.perf_counter()
                predictor(windows)
                end = time.perf_counter()
                rates.append((is_tissue.sum() / (middle - began), len(windows) / (end - middle)))
            ours, in_memory = (statistics.median(rate) for rate in zip(*rates[1:], strict=True))
            yield (
                f"{name}: {ours:.0f} cells/s, predictor {in_memory:.0f} img/s, "
                f"ratio {statistics.median(a / b for a, b in rates[1:]):.2f}"
            )


def run_large(run: Path, slide: Path, workdir: Path) -> dict[str, float]:
    """Runs the command on a slide, in a process of its own."""
    options = f"--config.predict.checkpoints={run}", f"--config.heatmap.slides={slide}"
    command = f"--config={run}/config.json", f"--workdir={workdir}", "--mode=heatmap", *options
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *command],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
