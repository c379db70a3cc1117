"""Heat maps beside WSInfer: windows a second of whole commands with the same network and spacing.

    .venv/bin/python tests/benchmarks/wsinfer.py WSINFER_PYTHON [ROUNDS]

WSINFER_PYTHON is the Python of an environment with WSInfer, apart because it needs old versions:

    pip install wsinfer 'zarr<3' 'numcodecs<0.16' 'tiffslide<3' openslide-python openslide-bin torch

The slide has about 4,000 windows of tissue, in a square amid glass. WSInfer runs the TorchScript
of `--mode=export`, by OpenSlide, with windows side by side, as it always places them; histo_jax has
`heatmap.stride=96`. Each finds tissue by its own rule, so windows a second are compared. Commands
are timed from start to end, in turns; the first round, which fills caches, does not count.
"""

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slides import ROOT, TISSUE, make_run, write_slide

# Without a request to the hub for the registry of public models.
WSINFER = """
import types
import wsinfer_zoo.client
wsinfer_zoo.client.load_registry = lambda *_, **__: types.SimpleNamespace(models={})
from wsinfer.cli.cli import cli
cli()
"""


def main(python: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "slides").mkdir()
        slide = write_slide(folder / "slides" / "slide.tif", 4 * TISSUE, 3 * TISSUE)
        for network in ("quickstart", "full"):
            run = make_run(folder / network, network)
            export = ("--mode=export", f"--workdir={run}", "--config.export.formats=torchscript")
            time_command([*histo_jax(run), *export])
            rates: list[tuple[float, float]] = []
            for number in range(rounds + 1):
                work = folder / f"{network}{number}"
                rates.append(
                    (run_ours(run, slide, work / "a"), run_wsinfer(python, run, work / "b"))
                )
            ours, other = (statistics.median(rate) for rate in zip(*rates[1:], strict=True))
            ratios = [a / b for a, b in rates[1:]]
            print(
                f"{network}: histo_jax {ours:.0f} windows/s, WSInfer {other:.0f}; "
                f"{statistics.median(ratios):.1f} times ({min(ratios):.1f} to {max(ratios):.1f})",
                flush=True,
            )


def histo_jax(run: Path) -> list[str]:
    return [sys.executable, "-m", "histo_jax.main", f"--config={run}/config.json"]


def run_ours(run: Path, slide: Path, workdir: Path) -> float:
    """Returns windows a second."""
    options = f"--config.predict.checkpoints={run}", f"--config.heatmap.slides={slide}"
    command = [*histo_jax(run), "--mode=heatmap", f"--workdir={workdir}", *options]
    seconds = time_command([*command, "--config.heatmap.stride=96"])
    (summary,) = workdir.rglob("slide.json")
    return json.loads(summary.read_text())["cells"] / seconds


def run_wsinfer(python: str, run: Path, folder: Path) -> float:
    """Returns windows a second."""
    model = run / "export" / "wsinfer"
    seconds = time_command([
        python, "-c", WSINFER, "--backend", "openslide", "run", "-i", str(run.parent / "slides"),
        "-o", str(folder), "-c", str(model / "config.json"),
        "-p", str(model / "torchscript_model.pt"), "-n", "1",
    ])  # fmt: skip
    (table,) = folder.rglob("slide.csv")
    with table.open() as file:
        return sum(1 for _ in csv.DictReader(file)) / seconds


def time_command(command: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.perf_counter() - began


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
