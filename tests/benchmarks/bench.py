"""histo_jax beside PyTorch, Keras on JAX and the way of teaching notebooks: one table.

    launch/bench.sh [--rows=train,epoch] [--rounds=5] [--minutes=8] [--json=FILE] [--growth]

All train the same network (checked by its parameters) on the same patches of noise at the same
batch size; nothing here depends on what a patch shows. Each framework has a process of its own and
the others are idle while it is timed. Every row is warmed up once, then its entries take turns,
A B C A B C, and each is compared with the row's first entry in the same round: the last column says
how many times as long it took, median and spread of the rounds. What the rows include:

    train      steps on one batch that lies on the device, augmentation included, until all are done
    epoch      a pass over the patches with all input; `step alone` is the same number of steps on
               one batch; PyTorch in the way that was fastest in `train`
    large      (GPU) seconds of a pass over 160,000 patches at several batch sizes
    predict    resident uint8 patches in, logits in the host's memory out
    averaging  the eight symmetries of each patch, beside eight times as many plain patches
    input      batches onto the device without training, from a new iterator on
    prepare    TIFFs, checked by their SHA-1, to records on disk
    memory     most memory of a process of its own that trains one epoch; DataLoader's workers are
               not counted
    start      processes from nothing: `--help`; `fit` until its first step is done, with records
               prepared and JAX's compilation cache filled
    growth     (--growth) prepare PatchCamelyon's HDF5 of 1,000 to 100,000 patches, and read 200
               batches from disk: seconds and most memory; needs 6 GB of disk
"""

import argparse
import dataclasses
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import floors
import numpy as np
from options import parse
from patches import write_kaggle, write_pcam
from report import Entry, Report, ratios
from worker import PeerError, Task, Worker

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# PyTorch also in a process whose allocator keeps freed memory, as histo_jax's own does: its tuning
# guide advises such an allocator on CPU.
TUNED = "pytorch_tuned"
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_ARENA_MAX": "1",
}
PEERS = ("histo", "pytorch", TUNED, "keras_jax", "teaching")
PYTORCH = [
    (f"PyTorch {way}{', tuned malloc' if peer == TUNED else ''}", peer, way)
    for peer in ("pytorch", TUNED)
    for way in ("eager", "compiled")
]
FIRST_STEP = """
import os, runpy, sys
from histo_jax.training import step
make = step.make_train_step
def make_and_leave(*args, **kwargs):
    train_step = make(*args, **kwargs)
    def first(*args):
        train_step(*args)[1].loss.block_until_ready()
        os._exit(0)
    return first
step.make_train_step = make_and_leave
runpy.run_module("histo_jax.main", run_name="__main__", alter_sys=True)
"""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured. Batch sizes are patches; `steps` and `calls` are what one turn does."""

    features: tuple[int, ...] = (32, 64, 128, 256, 512)
    dense: int = 1024
    batches: tuple[int, ...] = (64,)
    steps: int = 8
    epoch: int = 512
    large: int = 0
    large_batches: tuple[int, ...] = ()
    predict_batches: tuple[int, ...] = (256,)
    calls: int = 2
    files: int = 2048
    growth: tuple[int, ...] = (1_000, 3_000, 10_000, 30_000, 100_000)


CPU = Sizes()
GPU = Sizes(
    batches=(64, 512),
    steps=100,
    epoch=8192,
    large=160_000,
    calls=20,
    files=8192,
    large_batches=(64, 256, 512, 1024, 2048),
    predict_batches=(1024,),
)
SHORT = Sizes(
    features=(4, 4, 4, 4, 4),
    dense=8,
    batches=(8,),
    steps=2,
    epoch=16,
    large=32,
    large_batches=(8,),
    predict_batches=(8,),
    files=24,
    growth=(100, 200),
)


class Bench:
    """The rows."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._ends = time.monotonic() + 60 * options.minutes
        self._workers: dict[str, Worker] = {}
        self._environment = {
            **os.environ,
            # The processes share one GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        backend = "import jax; print(jax.default_backend())"
        gpu = self._process("-c", backend).stdout.strip() == "gpu"
        self._sizes = SHORT if options.short else GPU if gpu else CPU
        self._task = Task(
            self._sizes.features,
            self._sizes.dense,
            0.4,
            1.5e-4,
            cores,
            gpu,
            str(folder),
            self._sizes.epoch,
        )
        self._torch = PYTORCH[0]  # its fastest way, as soon as that is known
        self._report = Report(
            options.json,
            options.rounds,
            command=" ".join(["tests/benchmarks/bench.py", *sys.argv[1:]]),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            cores=cores,
            machine=platform.machine(),
            parameters={},
            versions={"python": platform.python_version()},
        )

    def run(self) -> None:
        self._start_workers()
        self._report.head()
        for row in self._options.rows:
            if time.monotonic() > self._ends:
                self._report.skip(row, f"{self._options.minutes} minutes were over")
                continue
            try:
                getattr(self, f"_{row}")()
            except PeerError as error:  # of histo_jax; the other rows are still measured
                self._report.skip(row, str(error))
            self._report.save()
        for worker in self._workers.values():
            worker.close()
        told = self._report.contents
        versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
        print(f"\n{told['device']}, {told['cores']} cores, {versions}; {told['rounds']} rounds")
        print(f"{told['date']}, {told['command']}, {self._options.json}")

    def _start_workers(self) -> None:
        """Starts all peers at once and drops those that cannot be imported."""
        # On a GPU nothing hangs on the host's allocator.
        peers = [peer for peer in PEERS if not (self._task.gpu and peer == TUNED)]
        workers = {peer: self._worker(peer) for peer in peers}
        write_kaggle(self._folder, self._sizes.files)
        told = self._report.contents
        for peer, worker in workers.items():
            try:
                hello = worker.answer()
                told["parameters"][peer] = worker.call("parameters")["result"]
            except PeerError as error:
                if peer == "histo":
                    raise
                self._report.skip(peer, str(error))
                continue
            self._workers[peer] = worker
            told["versions"].update(hello["versions"])
            if peer == "histo":
                told["device"], self._placements = hello["device"], hello["placements"]
        if len(set(told["parameters"].values())) > 1:
            raise AssertionError(f"not the same network: {told['parameters']}")

    def _worker(self, peer: str) -> Worker:
        tuned = TUNED_MALLOC if peer == TUNED else {}
        return Worker(peer.removesuffix("_tuned"), self._task, self._environment | tuned)

    def _process(self, *command: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=self._environment,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise PeerError(done.stderr.strip())
        return done

    def _ask(self, who: str, count: int, peer: str, method: str, *arguments: Any) -> list[Entry]:
        """The entry of a peer's method; none where the peer is not there."""
        if peer not in self._workers:
            return []
        worker = self._workers[peer]
        return [Entry(who, lambda: worker.call(method, *arguments)["seconds"], count)]

    def _train(self) -> None:
        sizes, histo = self._sizes, self._workers["histo"]
        rates = {name: histo.call(f"{name}_rate")["result"] for name in ("matrix", "copy")}
        self._report.note("floors", None, "matrix product", rates["matrix"] / 1e12, "TFLOP/s")
        self._report.note("floors", None, "copy", rates["copy"] / 1e9, "GB/s")
        for batch in sizes.batches:
            what = ("train", None, batch, sizes.steps)
            count = batch * sizes.steps
            entries = self._ask("histo_jax", count, "histo", *what)
            for who, peer, way in PYTORCH:
                entries += self._ask(who, count, peer, "train", way, batch, sizes.steps)
            entries += self._ask("Keras on JAX", count, "keras_jax", *what)
            times = self._report.measure("train", batch, entries)
            measured = [way for way in PYTORCH if way[0] in times]
            if measured:
                self._torch = min(measured, key=lambda way: statistics.median(times[way[0]]))
            step = statistics.median(times["histo_jax"]) * batch
            width = 2 if self._task.gpu else 4
            network = (sizes.features, sizes.dense, batch)
            operations = floors.operations(*network) / rates["matrix"]
            bytes_ = floors.transferred(*network, width) / rates["copy"]
            share = max(operations, bytes_) / step
            self._report.note("floors", batch, "operations", 1e3 * operations, "ms")
            self._report.note("floors", batch, "bytes", 1e3 * bytes_, "ms")
            self._report.note("floors", batch, "share that the step reaches", share, "")

    def _epochs(self, batch: int) -> Iterator[Entry]:
        epoch = self._sizes.epoch
        for placement in self._placements:
            who = f"histo_jax {placement}"
            yield from self._ask(who, epoch, "histo", "epoch", placement, batch, epoch)
        who, peer, way = self._torch
        yield from self._ask(f"{who}, resident", epoch, peer, "epoch", way, batch, epoch)
        yield from self._ask("Keras fit", epoch, "keras_jax", "epoch", None, batch, epoch)
        yield from self._ask("DataLoader, TIFFs", epoch, "teaching", "epoch", None, batch, epoch)

    def _epoch(self) -> None:
        for batch in self._sizes.batches:
            epoch = self._sizes.epoch
            what = ("train", None, batch, epoch // batch)
            alone = self._ask("histo_jax step alone", epoch, "histo", *what)
            times = self._report.measure("epoch", batch, [*self._epochs(batch), *alone])
            for placement in self._placements:
                over = ratios(times, f"histo_jax {placement}", alone[0].who)
                who = f"histo_jax {placement} over step alone"
                self._report.note("epoch", batch, who, statistics.median(over), "", over)

    def _large(self) -> None:
        placement, count = self._placements[0], self._sizes.large
        for batch in self._sizes.large_batches:
            what = ("epoch", placement, batch, count)
            who = f"histo_jax {placement}, {count:,} patches"
            self._report.measure("large", batch, self._ask(who, 0, "histo", *what))

    def _predict(self) -> None:
        for batch in self._sizes.predict_batches:
            what, count = (batch, self._sizes.calls), batch * self._sizes.calls
            entries = self._ask("histo_jax", count, "histo", "predict", "plain", *what)
            for who, peer, way in PYTORCH:
                entries += self._ask(who, count, peer, "predict", way, *what)
            entries += self._ask("Keras predict", count, "keras_jax", "predict", None, *what)
            self._report.measure("predict", batch, entries)

    def _averaging(self) -> None:
        for batch in self._sizes.predict_batches:
            count = 8 * batch
            entries = self._ask("histo_jax plain", count, "histo", "predict", "plain", batch, 8)
            what = ("predict", "averaged", batch, 1)
            entries += self._ask("histo_jax averaged, a symmetry", count, "histo", *what)
            self._report.measure("averaging", batch, entries)

    def _input(self) -> None:
        batch, epoch = self._sizes.batches[0], self._sizes.epoch
        entries = []
        for placement in self._placements:
            what = ("input", placement, batch, epoch)
            entries += self._ask(f"histo_jax {placement}", epoch, "histo", *what)
        entries += self._ask("DataLoader, TIFFs", epoch, "teaching", "input", None, batch, epoch)
        self._report.measure("input", batch, entries)

    def _prepare(self) -> None:
        what = ("prepare", "kaggle", "kaggle", "again")
        count = self._sizes.files + 1  # and one to predict
        self._report.measure("prepare", None, self._ask("histo_jax", count, "histo", *what))

    def _start(self) -> None:
        runs = self._folder / "runs"
        fit = [
            "--config=configs/kaggle.py",
            "--mode=fit",
            "--config.data.samples_per_class=None",
            f"--config.data.raw_dir={self._folder / 'kaggle'}",
            f"--config.data.tfds_dir={self._folder / 'start'}",
            f"--config.model.features={self._sizes.features}",
            f"--config.model.dense={self._sizes.dense}",
            f"--config.fit.batch_size={self._sizes.batches[0]}",
        ]

        def seconds(*command: str) -> float:
            began = time.perf_counter()
            self._process(*command)
            return time.perf_counter() - began

        def first_step() -> float:
            runs.mkdir(exist_ok=True)
            return seconds("-c", FIRST_STEP, *fit, f"--workdir={tempfile.mkdtemp(dir=runs)}")

        self._report.measure(
            "start",
            None,
            [
                Entry("--help", lambda: seconds("-m", "histo_jax.main", "--help"), 0),
                Entry("fit to its first step", first_step, 0),
            ],
        )

    def _memory(self) -> None:
        """One process each, with the caches of compilation filled by the rows before."""
        batch = self._sizes.batches[0]
        whats = {
            **{f"histo_jax {p}": ("histo", p) for p in self._placements},
            f"{self._torch[0]}, resident": self._torch[1:],
            "Keras fit": ("keras_jax", None),
            "DataLoader, TIFFs": ("teaching", None),
        }
        workers = {
            who: (self._worker(peer), way)
            for who, (peer, way) in whats.items()
            if peer in self._workers
        }
        for who, (worker, way) in workers.items():
            try:
                worker.answer()
                answer = worker.call("epoch", way, batch, self._sizes.epoch)
            except PeerError as error:
                self._report.skip(f"memory, {who}", str(error))
                continue
            finally:
                worker.close()
            self._report.note("memory", batch, who, answer["memory"] / 2**20, "MiB")
            if answer["device_memory"]:
                mebibytes = answer["device_memory"] / 2**20
                self._report.note("memory", batch, f"{who}, on the device", mebibytes, "MiB")

    def _growth(self) -> None:
        sizes, seconds = self._sizes.growth, []
        batch = self._sizes.batches[0]
        for count in sizes:
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                write_pcam(Path(folder), count)
                for what in ("prepare", "read"):
                    worker = self._worker("histo")
                    worker.answer()
                    reading = (batch, 200) if what == "read" else ()
                    answer = worker.call(what, "pcam", folder, f"{folder}/records", *reading)
                    worker.close()
                    who = f"{what}, {count:,} patches"
                    self._report.note("growth", None, who, answer["seconds"], "s")
                    self._report.note(
                        "growth", None, f"{who}, memory", answer["memory"] / 2**20, "MiB"
                    )
                    if what == "prepare":
                        seconds.append(answer["seconds"])
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        self._report.note("growth", None, "power of the count that preparing takes", slope, "")


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="histo_jax_bench_") as folder:
        Bench(options, Path(folder)).run()


if __name__ == "__main__":
    main()
