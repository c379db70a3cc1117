"""Runs a framework (a peer) in a process of its own, with its own thread pools and memory.

`Worker` is the end of the benchmark, `main` the end of the peer. They exchange lines of JSON: a
request `[method, arguments]`; a response with the time and the result of that method.
"""

import dataclasses
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # if histo_jax is not installed

# An allocator that keeps freed memory, as PyTorch's tuning guide recommends on CPU and as histo_jax
# uses it.
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_ARENA_MAX": "1",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """The task of all peers.

    Attributes:
        features: channels of the convolution blocks.
        dense: units of the dense layer.
        dropout: fraction of these units that is dropped.
        learning_rate: of Adam.
        cores: number of CPU cores to use.
        gpu: whether to use a GPU.
        folder: contains `images.npy`, `labels.npy` and the same patches as `kaggle/train/*.tif`.
        epoch: number of patches of an epoch.
    """

    features: tuple[int, ...]
    dense: int
    dropout: float
    learning_rate: float
    cores: int
    gpu: bool
    folder: str
    epoch: int

    def images(self) -> np.ndarray:
        """Returns the patches of an epoch, uint8[epoch, 96, 96, 3]."""
        return np.load(Path(self.folder) / "images.npy", mmap_mode="r")[: self.epoch].copy()

    def labels(self) -> np.ndarray:
        """Returns their labels, float32[epoch], 0 or 1."""
        return np.load(Path(self.folder) / "labels.npy")[: self.epoch]


class PeerError(Exception):
    """A peer cannot run a method; the text is the reason."""


class Worker:
    """A peer in its own process."""

    def __init__(self, peer: str, task: Task, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, peer, json.dumps(dataclasses.asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def send(self, method: str, *arguments: Any) -> None:
        try:
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"exited with {self._process.wait()}") from None

    def receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        response = json.loads(line) if line else {"error": f"exited with {self._process.wait()}"}
        if "error" in response:
            raise PeerError(response["error"])
        return response

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        self.send(method, *arguments)
        return self.receive()

    def close(self) -> None:
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def main() -> None:
    # Redirects what libraries print to stderr, so that stdout has the responses only.
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def respond(**values: object) -> None:
        responses.write(json.dumps(values) + "\n")
        responses.flush()

    try:
        peer = importlib.import_module(f"peers.{sys.argv[1]}").Peer(Task(**json.loads(sys.argv[2])))
    except ImportError as error:
        return respond(error=f"{error}")
    respond(**peer.hello())
    for line in sys.stdin:
        method, arguments = json.loads(line)
        gc.collect()
        start = time.perf_counter()
        try:
            result = getattr(peer, method)(*arguments)
        except Exception as error:  # the other variants of the peer are still measured
            traceback.print_exc()
            respond(error=f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        respond(seconds=seconds, result=result, memory=peak, device_memory=peer.device_memory())


if __name__ == "__main__":
    main()
