"""Images a second of one run by 1, 2 and 4 processes on this machine.

    .venv/bin/python tests/benchmarks/scaling.py [--rounds=3]

Each process has one CPU device. XLA lets a process use all cores, so one process has the whole
machine already: what is measured is what the division costs, and what a single CPU device gains by
computing by tiles, which several do not. The drawn slides and the network of the quickstart, a
global batch of 64, the third epoch of three; the rounds take turns.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rate(folder: Path, count: int, number: int) -> float:
    workdir = folder / f"run_{count}_{number}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "histo_jax.main",
        f"--config={ROOT / 'configs' / 'quickstart.py'}",
        f"--workdir={workdir}",
        "--mode=fit",
        "--config.fit.epochs=3",
        f"--config.data.tfds_dir={folder / 'records'}",
    ]
    hosts = ["--multihost=manual", f"--coordinator=127.0.0.1:{port}", f"--process_count={count}"]
    processes = [
        subprocess.Popen(
            [*command, *((*hosts, f"--process_index={index}") if count > 1 else ())],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index in range(count)
    ]
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RuntimeError(f"{count} processes failed")
    return json.loads((workdir / "status.json").read_text())["images_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        rate(Path(folder), 1, -1)  # prepares and compiles
        rates = {count: [] for count in (1, 2, 4)}
        for number in range(rounds):
            for count, found in rates.items():
                found.append(rate(Path(folder), count, number))
    alone = statistics.median(rates[1])
    print("| processes | img/s | of one process |\n|---|---|---|")
    for count, found in rates.items():
        median = statistics.median(found)
        spread = f"{min(found):.0f} to {max(found):.0f}"
        print(f"| {count} | {median:.0f} ({spread}) | {median / alone:.0%} |")


if __name__ == "__main__":
    main()
