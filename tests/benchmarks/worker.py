"""One framework in a process of its own, so that thread pools and memory do not mix.

`Worker` is the end of the one who asks, `main` that of the peer. They speak JSON, a line each:
`[method, arguments]`, and the seconds that the peer's method took and what it returned.
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

sys.path.insert(0, str(Path(__file__).parents[2]))  # also where histo_jax is not installed


@dataclasses.dataclass(frozen=True)
class Task:
    """What all peers do alike.

    Attributes:
        features: channels of the convolution blocks.
        dense: units of the dense layer.
        dropout: share of them dropped.
        learning_rate: Adam's.
        cores: processors that may be used.
        gpu: whether to use one.
        folder: holds `images.npy`, `labels.npy` and the same patches as `kaggle/train/*.tif`.
        epoch: patches of an epoch, the first of all.
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
        """Returns the epoch's patches, uint8[epoch, 96, 96, 3]."""
        return np.load(Path(self.folder) / "images.npy", mmap_mode="r")[: self.epoch].copy()

    def labels(self) -> np.ndarray:
        """Returns their labels, float32[epoch], 0 or 1."""
        return np.load(Path(self.folder) / "labels.npy")[: self.epoch]


class PeerError(Exception):
    """A peer cannot do what was asked; the text says why."""


class Worker:
    """A peer in its own process, which works from `ask` until `answer` returns."""

    def __init__(self, peer: str, task: Task, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, peer, json.dumps(dataclasses.asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, method: str, *arguments: Any) -> None:
        try:
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"ended with {self._process.wait()}") from None

    def answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with {self._process.wait()}"}
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        self.ask(method, *arguments)
        return self.answer()

    def close(self) -> None:
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def main() -> None:
    # What libraries print goes to stderr, so that it cannot mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        peer = importlib.import_module(f"peers.{sys.argv[1]}").Peer(Task(**json.loads(sys.argv[2])))
    except ImportError as error:
        return answer(error=f"{error}")
    answer(**peer.hello())
    for line in sys.stdin:
        method, arguments = json.loads(line)
        gc.collect()
        began = time.perf_counter()
        try:
            result = getattr(peer, method)(*arguments)
        except Exception as error:  # of one way of a peer; the others are still measured
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        answer(seconds=seconds, result=result, memory=peak, device_memory=peer.device_memory())


if __name__ == "__main__":
    main()
