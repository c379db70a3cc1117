"""Images per second of one run with 1, 2 and 4 processes on this machine.

    .venv/bin/python tests/benchmarks/scaling.py [--rounds=3]

Each process has one CPU device. One process already uses all cores, so this measures the overhead
of several processes, and the gain of Winograd convolutions, which need a single CPU device. Data
and network are those of the quickstart, with a global batch of 64; the rate is that of the third
epoch. Rounds are interleaved.
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
        rate(Path(folder), 1, -1)  # prepares the records and fills the compilation cache
        rates = {count: [] for count in (1, 2, 4)}
        for number in range(rounds):
            for count, values in rates.items():
                values.append(rate(Path(folder), count, number))
    single = statistics.median(rates[1])
    print("| processes | img/s | relative to one process |\n|---|---|---|")
    for count, values in rates.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"| {count} | {median:.0f} ({spread}) | {median / single:.0%} |")


if __name__ == "__main__":
    main()
