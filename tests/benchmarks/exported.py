"""Speed of exported files beside the predictor, in interleaved rounds on one machine.

    python tests/benchmarks/exported.py [--rounds=5] [--batch_size=256] [--threads=2]

Exports the five-block network (32, 64, 128, 256, 512 channels) and the symmetric one (4, 8, 16, 32,
64 in eight orientations) with drawn weights. Prints for each format its bytes, the largest
difference to the predictor, the median of images a second, and the speed relative to the
predictor's: median and range over the rounds. onnxruntime and OpenVINO also run what PyTorch
exports of `model.py`. PyTorch, and the engines that run its export, have an allocator that keeps
freed memory, as histo_jax has. Each format runs in a process of its own; one process at a time
computes. `launch/install.sh bench` installs all; missing ones are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from worker import TUNED_MALLOC

sys.path.insert(0, str(Path(__file__).parents[2]))  # if histo_jax is not installed

NETWORKS = {
    "five_block": {"features": (32, 64, 128, 256, 512), "dense": 1024},
    "five_block_p4m": {"features": (4, 8, 16, 32, 64), "dense": 256},
}
PYTORCH_EXPORT = "pytorch.onnx"
# As the table names them.
FORMATS = {
    "predictor": "predictor (`model.safetensors`)",
    "onnx": "`model.onnx`, onnxruntime",
    "openvino": "`model.onnx`, OpenVINO",
    "onnx_of_pytorch": "PyTorch's export of `model.py`, onnxruntime",
    "openvino_of_pytorch": "PyTorch's export of `model.py`, OpenVINO",
    "stablehlo": "`model.stablehlo`, JAX",
    "pytorch": "`model.py`, PyTorch",
    "pytorch_compiled": "`model.py`, PyTorch, compiled",
    "torchscript": "`wsinfer/`, TorchScript",
}


def predictor(folder: Path, batch_size: int) -> Any:
    import histo_jax

    return histo_jax.load(folder, batch_size=batch_size).logits


def onnx(folder: Path, threads: int, file: str = "model.onnx") -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        folder / file, options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(["logit"], {"images": x})[0]


def openvino(folder: Path, threads: int, file: str = "model.onnx") -> Any:
    import openvino

    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(folder / file, "CPU", config)
    return lambda x: model(x)["logit"]


def stablehlo(folder: Path) -> Any:
    import jax

    content = bytearray((folder / "model.stablehlo").read_bytes())
    call = jax.jit(jax.export.deserialize(content).call)
    return lambda x: np.asarray(call(x)[1])


def load_pytorch(folder: Path) -> Any:
    sys.path.insert(0, str(folder))
    from model import load

    return load()


def pytorch(folder: Path, threads: int, is_compiled: bool = False) -> Any:
    import torch

    torch.set_num_threads(threads)
    network = load_pytorch(folder).to(memory_format=torch.channels_last)
    if is_compiled:
        network = torch.compile(network, dynamic=False)

    def call(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(x))[1].numpy()

    return call


def torchscript(folder: Path, threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    network = torch.jit.load(folder / "wsinfer" / "torchscript_model.pt")

    def call(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
            return network(pixels)[:, 1].numpy()

    return call


def export_pytorch(folder: Path, batch_size: int) -> None:
    """Writes the ONNX file that PyTorch makes of `model.py`, for one size of a batch."""
    import torch

    images = torch.zeros(batch_size, 96, 96, 3, dtype=torch.uint8)
    torch.onnx.export(
        load_pytorch(folder).eval(),
        (images,),
        str(folder / PYTORCH_EXPORT),
        input_names=["images"],
        output_names=["probability", "logit"],
        dynamo=True,
        external_data=False,
    )


def serve(name: str, folder: Path, batch_size: int, threads: int) -> None:
    """Answers each line on stdin by the seconds of one batch; the first also by its logits."""
    images = np.random.default_rng(0).integers(0, 256, (batch_size, 96, 96, 3), np.uint8)
    call = {
        "predictor": lambda: predictor(folder, batch_size),
        "onnx": lambda: onnx(folder, threads),
        "openvino": lambda: openvino(folder, threads),
        "onnx_of_pytorch": lambda: onnx(folder, threads, PYTORCH_EXPORT),
        "openvino_of_pytorch": lambda: openvino(folder, threads, PYTORCH_EXPORT),
        "stablehlo": lambda: stablehlo(folder),
        "pytorch": lambda: pytorch(folder, threads),
        "pytorch_compiled": lambda: pytorch(folder, threads, is_compiled=True),
        "torchscript": lambda: torchscript(folder, threads),
    }[name]()
    for _ in range(2):
        logits = np.asarray(call(images), np.float64)
    print(json.dumps(logits.ravel().tolist()), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        call(images)
        print(time.perf_counter() - start, flush=True)


def start(name: str, folder: Path, options: argparse.Namespace) -> subprocess.Popen[str]:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: options.threads]))
    command = [sys.executable, __file__, "--serve", name, "--folder", str(folder)]
    command += [f"--batch_size={options.batch_size}", f"--threads={options.threads}"]
    return subprocess.Popen(
        ["taskset", "-c", cores, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(options.threads)}
        | (TUNED_MALLOC if "pytorch" in name or name == "torchscript" else {}),
    )


def export(name: str, folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """Writes all formats of a network with drawn weights; returns their bytes."""
    import jax

    from histo_jax import exported
    from histo_jax.config import Config, ModelConfig
    from histo_jax.data.example import PatchSpec
    from histo_jax.export import onnx, safetensors, stablehlo, torchscript
    from histo_jax.metrics import Calibration
    from histo_jax.models import create_model
    from histo_jax.predictor import load
    from histo_jax.training.state import init_weights

    config = Config(model=ModelConfig(name=name, **NETWORKS[name]))
    mean, std = np.full(3, 0.6, np.float32), np.full(3, 0.25, np.float32)
    weights = init_weights(create_model(config.model), jax.random.key(0), mean, std, 96)
    network = exported.Network(config, weights, Calibration(), 0, "")
    contents = exported.Exported(
        [network], False, None, PatchSpec(96, 32, 0.972), ("normal", "tumor")
    )
    folder.mkdir()
    safetensors.write(folder, contents, contents.pack())
    loaded = load(folder)
    onnx.write(folder / "model.onnx", loaded, 96, {})
    stablehlo.write(folder / "model.stablehlo", loaded, 96)
    torchscript.write(folder / "wsinfer", contents, contents.pack())
    command = [sys.executable, __file__, "--serve", "export", "--folder", str(folder)]
    subprocess.run([*command, f"--batch_size={options.batch_size}"], check=False)
    files = {
        "predictor": "model.safetensors",
        "onnx": "model.onnx",
        "openvino": "model.onnx",
        "onnx_of_pytorch": PYTORCH_EXPORT,
        "openvino_of_pytorch": PYTORCH_EXPORT,
        "stablehlo": "model.stablehlo",
        "pytorch": "model.safetensors",
        "pytorch_compiled": "model.safetensors",
        "torchscript": "wsinfer/torchscript_model.pt",
    }
    return {
        format: (folder / file).stat().st_size
        for format, file in files.items()
        if (folder / file).exists()
    }


def measure(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Prints the table of one network."""
    sizes = export(name, folder, options)
    formats = [format for format in options.formats if format in sizes]
    processes = {format: start(format, folder, options) for format in formats}
    logits = {}
    for format, process in list(processes.items()):
        line = process.stdout.readline()  # type: ignore[union-attr]
        if line:
            logits[format] = np.array(json.loads(line))
        else:
            print(f"{format} cannot run here", file=sys.stderr)
            del processes[format]
    times: dict[str, list[float]] = {format: [] for format in processes}
    for _ in range(options.rounds):
        for format, process in processes.items():
            assert process.stdin
            assert process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            times[format].append(float(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    speed = {f: options.batch_size / statistics.median(t) for f, t in times.items()}
    print(
        f"\n{name}: batch {options.batch_size}, {options.threads} threads, {options.rounds} rounds"
    )
    print(
        f"\n| {name}, {sizes['predictor'] / 1e6:.1f} MB of weights | bytes | largest difference of "
        "a logit | img/s | times the predictor |\n|---|---|---|---|---|"
    )
    for format in processes:
        difference = np.abs(logits[format] - logits["predictor"]).max()
        print(
            f"| {FORMATS[format]} | {sizes[format]:,} | {difference or 0:.2g} | "
            f"{speed[format]:,.0f} | {relative(times, format)} |"
        )


def relative(times: dict[str, list[float]], format: str) -> str:
    """Returns the speed relative to the predictor's in the same round: median and range."""
    ratios = [
        of_predictor / own
        for of_predictor, own in zip(times["predictor"], times[format], strict=True)
    ]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", default=",".join(FORMATS), type=lambda text: text.split(","))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve == "export":
        export_pytorch(options.folder, options.batch_size)
        return
    if options.serve:
        serve(options.serve, options.folder, options.batch_size, options.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name in NETWORKS:
            measure(name, Path(temporary) / name, options)


if __name__ == "__main__":
    main()
