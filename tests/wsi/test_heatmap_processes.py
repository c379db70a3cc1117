"""Maps by real processes: slides that several share, and processes that are killed."""

import json
import os
import random
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from histo_jax.metrics import Calibration

tifffile = pytest.importorskip("tifffile", reason="the extra slides is not installed")
NAMES = ("0", "1", "2")


class Place:
    """A run, and three slides of which one cannot be read where `broken`."""

    def __init__(self, folder, run, server):
        self.run, self.slides, self.server = run, folder / "slides", server

    def start(self, workdir, *options):
        if not workdir.exists():
            shutil.copytree(self.run, workdir)
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        return self.server.start(
            "-m", "histo_jax.main", f"--workdir={workdir}", "--mode=heatmap",
            f"--config.heatmap.slides={self.slides}", *options, environment=environment,
        )  # fmt: skip


@pytest.fixture
def place(tmp_path, make_tiny_config, save_run, write_slide, tissue_pixels, fork_server):
    run = save_run(make_tiny_config(), tmp_path / "run", Calibration())
    found = Place(tmp_path, run, fork_server)
    found.slides.mkdir()
    for number, name in enumerate(NAMES):
        pixels = tissue_pixels(700, 700, (64, 64 * number, 200), seed=number)
        write_slide(found.slides / f"{name}.tif", pixels, 0.486, levels=2)
    return found


def contents(workdir):
    """What must be equal in two runs: all but seconds, and identities that are made up."""
    found = {}
    for path in (workdir / "heatmaps").rglob("*"):
        name = str(path.relative_to(workdir))
        if path.name == "slide.json":
            values = json.loads(path.read_text())
            del values["seconds"], values["networks"], values["inputs"]
            found[name] = values
        elif path.suffix == ".tif":
            found[name] = tifffile.imread(path).tobytes()
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


@pytest.mark.slow
def test_processes_share_the_slides(place, tmp_path):
    """Each slide is made once; both processes report the one that fails."""
    (place.slides / "3.tif").write_text("broken")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = ["--multihost=manual", f"--coordinator={coordinator}", "--process_count=2"]
    workdir = tmp_path / "shared"
    shutil.copytree(place.run, workdir)
    group = [place.start(workdir, *hosts, f"--process_index={index}") for index in range(2)]
    errors = [process.communicate()[1] for process in group]
    assert [process.returncode for process in group] == [2, 2], errors
    # The second one logs no more than its failure.
    assert re.findall(r"slide (\d/2): .*/(\d)\.tif", errors[0]) == [("1/2", "0"), ("2/2", "2")]
    assert "3.tif is not a slide" in errors[1].splitlines()[0]
    assert all("1 of 4 slides failed" in error for error in errors)
    assert all((workdir / "heatmaps" / name / "slide.json").exists() for name in NAMES)
    assert (workdir / "heatmaps/index.html").read_text().count("<section") == 3


def wait_for_first_slide(process):
    while "slide 1/" not in process.output("stderr") and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
def test_maps_of_killed_processes_equal_those_of_an_unkilled_one(place, tmp_path):
    """SIGKILL comes at random moments while maps are made; then the command may end."""
    unkilled, killed = tmp_path / "unkilled", tmp_path / "killed"
    for workdir in (tmp_path / "compiles", unkilled):
        process = place.start(workdir)
        wait_for_first_slide(process)
        began = time.monotonic()
        process.communicate()
        seconds = time.monotonic() - began
    expected = contents(unkilled)
    assert len(expected) == 3 * 8 + 1
    assert np.isfinite(expected["heatmaps/0/slide.json"]["highest"])
    rng, statuses = random.Random(0), []
    for _ in range(8):
        process = place.start(killed)
        wait_for_first_slide(process)
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        process.communicate()
        statuses.append(process.returncode)
        if process.returncode == 0:
            shutil.rmtree(killed / "heatmaps")
            continue
        for name in NAMES:  # whole or absent
            there = [path for path in contents(killed) if path.startswith(f"heatmaps/{name}/")]
            assert len(there) in (0, 8)
    process = place.start(killed)
    process.communicate()
    assert process.returncode == 0
    print(statuses)
    assert -signal.SIGKILL in statuses
    found = contents(killed)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]
    assert not list((killed / "heatmaps").glob(".*"))
