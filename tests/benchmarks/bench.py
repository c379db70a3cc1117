"""Compares histo_jax with PyTorch, Keras on JAX and the code of teaching notebooks; prints a table.

    launch/bench.sh [--rows=train,epoch] [--rounds=5] [--minutes=60] [--json=FILE] [--growth]

All frameworks (peers) train the same network (its number of parameters is checked) on the same
patches of noise at the same batch size; no timing depends on the contents of a patch. Each peer
has a process of its own; the others are idle while it is timed. The entries of a row are warmed up,
then measured alternately, A B C A B C. The last column is the time relative to the first entry of
the row in the same round: median and range over the rounds. `Bench` has one method per row:

    train      training steps on one batch on the device, including augmentation
    epoch      an epoch including all input; `step only` is the same number of steps on one batch;
               PyTorch in the variant that was fastest in `train`
    large      (GPU) an epoch of 160,000 patches at several batch sizes, seconds
    predict    from uint8 patches on the device to logits in host memory
    tta        test-time augmentation (eight symmetries) of a patch, and prediction of eight patches
    input      batches to the device, without training, including the start of the iterator
    images     class folders of PNG 96x96 and of JPEG 256x256, without training: the first epoch,
               for which histo_jax prepares its records, and the next one; beside Pillow in a
               DataLoader with as many workers as cores
    prepare    from TIFFs, verified by SHA-1, to records on disk
    memory     peak memory of a process that trains one epoch, without the workers of DataLoader
    start      new processes, with prepared records and a filled compilation cache: `--help`; `fit`
               until the end of its first step, `evaluate` and `predict` until that of their first
               batch
    growth     (--growth) preparing HDF5 files of 1,000 to 100,000 patches, and reading 200 batches
               from disk: seconds and peak memory; needs 6 GB of disk
"""

import argparse
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

import numpy as np
import roofline
from options import parse
from patches import write_images, write_kaggle, write_pcam
from report import Entry, Report, ratios
from sizes import CPU, GPU, SHORT
from worker import TUNED_MALLOC, PeerError, Task, Worker

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TUNED = "pytorch_tuned"
PEERS = ("histo", "pytorch", TUNED, "keras_jax", "teaching")
PYTORCH = [
    (f"PyTorch {variant}{', tuned malloc' if peer == TUNED else ''}", peer, variant)
    for peer in ("pytorch", TUNED)
    for variant in ("eager", "compiled")
]
FIRST_STEP = """
import os, runpy, sys
from histo_jax.training import step
make = step.make_train_step
def make_and_exit(*args, **kwargs):
    train_step = make(*args, **kwargs)
    def first(*args):
        train_step(*args)[1].loss.block_until_ready()
        os._exit(0)
    return first
step.make_train_step = make_and_exit
runpy.run_module("histo_jax.main", run_name="__main__", alter_sys=True)
"""
FIRST_BATCH = """
import os, runpy
import jax
from histo_jax import predictor
def first(outputs):
    jax.block_until_ready(next(outputs))
    os._exit(0)
predictor.read_behind = first
runpy.run_module("histo_jax.main", run_name="__main__", alter_sys=True)
"""


class Bench:
    """Measures the rows."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._ends = time.monotonic() + 60 * options.minutes
        self._workers: dict[str, Worker] = {}
        self._environment = {
            **os.environ,
            # All peers share one GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
            # A measurement starts with an empty cache; the short form shares that of the tests.
            "JAX_COMPILATION_CACHE_DIR": (os.environ if options.short else {}).get(
                "JAX_COMPILATION_CACHE_DIR", str(folder / "cache")
            ),
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
        self._torch = PYTORCH[0]  # the fastest variant, once that is known
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
                self._report.skip(row, f"the time of {self._options.minutes} minutes is over")
                continue
            try:
                getattr(self, f"_{row}")()
            except PeerError as error:  # histo_jax failed; the other rows are still measured
                self._report.skip(row, str(error))
            self._report.save()
        for worker in self._workers.values():
            worker.close()
        info = self._report.contents
        versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
        print(f"\n{info['device']}, {info['cores']} cores, {versions}; {info['rounds']} rounds")
        print(f"{info['date']}, {info['command']}, {self._options.json}")

    def _start_workers(self) -> None:
        """Starts all peers and drops those that cannot be imported."""
        # On a GPU the allocator of the host does not matter.
        peers = [peer for peer in PEERS if not (self._task.gpu and peer == TUNED)]
        workers = {peer: self._worker(peer) for peer in peers}
        write_kaggle(self._folder, self._sizes.files)
        info = self._report.contents
        for peer, worker in workers.items():
            try:
                hello = worker.receive()
                info["parameters"][peer] = worker.call("parameters")["result"]
            except PeerError as error:
                if peer == "histo":
                    raise
                self._report.skip(peer, str(error))
                continue
            self._workers[peer] = worker
            info["versions"].update(hello["versions"])
            if peer == "histo":
                info["device"], self._placements = hello["device"], hello["placements"]
        if len(set(info["parameters"].values())) > 1:
            raise AssertionError(f"the networks differ: {info['parameters']}")

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

    def _entry(self, name: str, count: int, peer: str, method: str, *arguments: Any) -> list[Entry]:
        """Returns the entry of a method of a peer, or none if the peer is missing."""
        if peer not in self._workers:
            return []
        worker = self._workers[peer]
        return [Entry(name, lambda: worker.call(method, *arguments)["seconds"], count)]

    def _train(self) -> None:
        sizes, histo = self._sizes, self._workers["histo"]
        rates = {
            "matrix": histo.call("matrix_rate", sizes.matrix)["result"],
            "copy": histo.call("copy_rate", sizes.copy)["result"],
        }
        self._report.note("roofline", None, "matrix product", rates["matrix"] / 1e12, "TFLOP/s")
        self._report.note("roofline", None, "copy", rates["copy"] / 1e9, "GB/s")
        for batch in sizes.batches:
            call = ("train", None, batch, sizes.steps)
            count = batch * sizes.steps
            entries = self._entry("histo_jax", count, "histo", *call)
            for name, peer, variant in PYTORCH:
                entries += self._entry(name, count, peer, "train", variant, batch, sizes.steps)
            entries += self._entry("Keras on JAX", count, "keras_jax", *call)
            times = self._report.measure("train", batch, entries)
            measured = [variant for variant in PYTORCH if variant[0] in times]
            if measured:
                self._torch = min(
                    measured, key=lambda variant: statistics.median(times[variant[0]])
                )
            step = statistics.median(times["histo_jax"]) * batch
            width = 2 if self._task.gpu else 4
            network = (sizes.features, sizes.dense, batch)
            operation_time = roofline.operations(*network) / rates["matrix"]
            transfer_time = roofline.transferred(*network, width) / rates["copy"]
            fraction = max(operation_time, transfer_time) / step
            self._report.note("roofline", batch, "operations", 1e3 * operation_time, "ms")
            self._report.note("roofline", batch, "bytes", 1e3 * transfer_time, "ms")
            self._report.note("roofline", batch, "fraction of the roofline reached", fraction, "")

    def _epochs(self, batch: int) -> Iterator[Entry]:
        epoch = self._sizes.epoch
        for placement in self._placements:
            name = f"histo_jax {placement}"
            yield from self._entry(name, epoch, "histo", "epoch", placement, batch, epoch)
        name, peer, variant = self._torch
        yield from self._entry(f"{name}, resident", epoch, peer, "epoch", variant, batch, epoch)
        yield from self._entry("Keras fit", epoch, "keras_jax", "epoch", None, batch, epoch)
        yield from self._entry("DataLoader, TIFFs", epoch, "teaching", "epoch", None, batch, epoch)

    def _epoch(self) -> None:
        for batch in self._sizes.batches:
            epoch = self._sizes.epoch
            call = ("train", None, batch, epoch // batch)
            step_only = self._entry("histo_jax step only", epoch, "histo", *call)
            times = self._report.measure("epoch", batch, [*self._epochs(batch), *step_only])
            for placement in self._placements:
                relative = ratios(times, f"histo_jax {placement}", step_only[0].name)
                name = f"histo_jax {placement} / step only"
                self._report.note("epoch", batch, name, statistics.median(relative), "", relative)

    def _large(self) -> None:
        placement, count = self._placements[0], self._sizes.large
        for batch in self._sizes.large_batches:
            call = ("epoch", placement, batch, count)
            name = f"histo_jax {placement}, {count:,} patches"
            self._report.measure("large", batch, self._entry(name, 0, "histo", *call))

    def _predict(self) -> None:
        for batch in self._sizes.predict_batches:
            call, count = (batch, self._sizes.calls), batch * self._sizes.calls
            entries = self._entry("histo_jax", count, "histo", "predict", "plain", *call)
            for name, peer, variant in PYTORCH:
                entries += self._entry(name, count, peer, "predict", variant, *call)
            entries += self._entry("Keras predict", count, "keras_jax", "predict", None, *call)
            self._report.measure("predict", batch, entries)

    def _tta(self) -> None:
        for batch in self._sizes.predict_batches:
            count = 8 * batch
            entries = self._entry("histo_jax plain", count, "histo", "predict", "plain", batch, 8)
            call = ("predict", "tta", batch, 1)
            entries += self._entry("histo_jax tta, per symmetry", count, "histo", *call)
            self._report.measure("tta", batch, entries)

    def _input(self) -> None:
        batch, epoch = self._sizes.batches[0], self._sizes.epoch
        entries = []
        for placement in self._placements:
            call = ("input", placement, batch, epoch)
            entries += self._entry(f"histo_jax {placement}", epoch, "histo", *call)
        entries += self._entry("DataLoader, TIFFs", epoch, "teaching", "input", None, batch, epoch)
        self._report.measure("input", batch, entries)

    def _images(self) -> None:
        batch, count = self._sizes.batches[0], self._sizes.images
        worker = self._worker("pillow")
        try:
            worker.receive()
        except PeerError as error:
            self._report.skip("pillow", str(error))
        else:
            self._workers["pillow"] = worker
        for name, suffix, size in (("PNG 96x96", ".png", 96), ("JPEG 256x256", ".jpg", 256)):
            folder = f"images{size}"
            write_images(self._folder / folder, suffix, size, count)
            for method in ("first_epoch", "next_epoch"):
                self._report.measure(
                    "images",
                    batch,
                    [
                        entry
                        for title, peer in (("histo_jax", "histo"), ("DataLoader", "pillow"))
                        for entry in self._entry(
                            f"{title} {name}, {method.replace('_', ' ')}", count, peer, method,
                            folder, batch,
                        )
                    ],
                )  # fmt: skip

    def _prepare(self) -> None:
        call = ("prepare", "kaggle", "kaggle", "prepared")
        count = self._sizes.files + 1  # and one test patch
        self._report.measure("prepare", None, self._entry("histo_jax", count, "histo", *call))

    def _start(self) -> None:
        runs = self._folder / "runs"
        # A config has five blocks; the short form has fewer.
        features = (*self._sizes.features, *self._sizes.features[-1:] * 5)[:5]
        settings = [
            "--config=configs/kaggle.py",
            "--config.data.samples_per_class=None",
            f"--config.data.raw_dir={self._folder / 'kaggle'}",
            f"--config.data.tfds_dir={self._folder / 'start'}",
            f"--config.model.features={features}",
            f"--config.model.dense={self._sizes.dense}",
            f"--config.fit.batch_size={self._sizes.batches[0]}",
            "--config.fit.epochs=1",
            "--config.fit.steps_per_epoch=1",
        ]
        trained = f"--workdir={self._folder / 'trained'}"
        self._process("-m", "histo_jax.main", *settings, "--mode=fit", trained)

        def seconds(*command: str) -> float:
            start = time.perf_counter()
            self._process(*command)
            return time.perf_counter() - start

        def first_step() -> float:
            runs.mkdir(exist_ok=True)
            workdir = f"--workdir={tempfile.mkdtemp(dir=runs)}"
            return seconds("-c", FIRST_STEP, *settings, "--mode=fit", workdir)

        def first_batch(mode: str) -> float:
            return seconds("-c", FIRST_BATCH, *settings, f"--mode={mode}", trained)

        self._report.measure(
            "start",
            None,
            [
                Entry("--help", lambda: seconds("-m", "histo_jax.main", "--help"), 0),
                Entry("fit until its first step", first_step, 0),
                Entry("evaluate until its first batch", lambda: first_batch("evaluate"), 0),
                Entry("predict until its first batch", lambda: first_batch("predict"), 0),
            ],
        )

    def _memory(self) -> None:
        """Starts one process per entry; earlier rows have filled the compilation caches."""
        batch = self._sizes.batches[0]
        # In the short form the row `epoch` has run the others.
        placements = self._placements[: 1 if self._options.short else None]
        calls = {
            **{f"histo_jax {p}": ("histo", p) for p in placements},
            f"{self._torch[0]}, resident": self._torch[1:],
            "Keras fit": ("keras_jax", None),
            "DataLoader, TIFFs": ("teaching", None),
        }
        workers = {
            name: (self._worker(peer), variant)
            for name, (peer, variant) in calls.items()
            if peer in self._workers
        }
        for name, (worker, variant) in workers.items():
            try:
                worker.receive()
                result = worker.call("epoch", variant, batch, self._sizes.epoch)
            except PeerError as error:
                self._report.skip(f"memory, {name}", str(error))
                continue
            finally:
                worker.close()
            self._report.note("memory", batch, name, result["memory"] / 2**20, "MiB")
            if result["device_memory"]:
                mebibytes = result["device_memory"] / 2**20
                self._report.note("memory", batch, f"{name}, on the device", mebibytes, "MiB")

    def _growth(self) -> None:
        sizes, seconds = self._sizes.growth, []
        batch = self._sizes.batches[0]
        for count in sizes:
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                write_pcam(Path(folder), count)
                for method in ("prepare", "read"):
                    worker = self._worker("histo")
                    worker.receive()
                    reading = (batch, 200) if method == "read" else ()
                    result = worker.call(method, "pcam", folder, f"{folder}/records", *reading)
                    worker.close()
                    name = f"{method}, {count:,} patches"
                    self._report.note("growth", None, name, result["seconds"], "s")
                    self._report.note(
                        "growth", None, f"{name}, memory", result["memory"] / 2**20, "MiB"
                    )
                    if method == "prepare":
                        seconds.append(result["seconds"])
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        self._report.note("growth", None, "exponent of the preparation time", slope, "")


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="histo_jax_bench_") as folder:
        Bench(options, Path(folder)).run()


if __name__ == "__main__":
    main()
