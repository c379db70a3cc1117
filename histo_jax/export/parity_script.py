"""Applies one exported file to images: `python FILE FORMAT MODEL IMAGES OUTPUT`.

Run in a process of its own, which can import neither histo_jax nor what the format does without.
Reads uint8[n, size, size, 3] and writes probability and logit, float64[n], and versions.
"""

import sys

# A module that is None cannot be imported.
_ABSENT = {
    "onnx": ("histo_jax", "flax", "jax", "onnx", "safetensors", "torch"),
    "stablehlo": ("histo_jax", "flax", "onnx", "onnxruntime", "safetensors", "torch"),
    "pytorch": ("histo_jax", "flax", "jax", "onnx", "onnxruntime"),
    "torchscript": ("histo_jax", "flax", "jax", "onnx", "onnxruntime", "safetensors"),
}
if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(_ABSENT[sys.argv[1]]))  # type: ignore[arg-type]

import json
from collections.abc import Callable
from typing import Any

import numpy as np

Apply = Callable[[Any], tuple[Any, Any]]
# Uneven, so that the last batch differs from the others.
_BATCH = 60


def onnx(path: str) -> tuple[Apply, Any]:
    """Returns the function of `model.onnx`, and the module that runs it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: tuple(session.run(["probability", "logit"], {"images": x})), onnxruntime


def stablehlo(path: str) -> tuple[Apply, Any]:
    """Likewise of `model.stablehlo`."""
    import jax
    from jax import export

    with open(path, "rb") as file:
        exported = export.deserialize(bytearray(file.read()))
    return jax.jit(exported.call), jax


def pytorch(path: str) -> tuple[Apply, Any]:
    """Likewise of `model.py`."""
    import importlib.util

    import torch

    specification = importlib.util.spec_from_file_location("model", path)
    assert specification
    assert specification.loader
    model = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(model)
    network = model.load()
    return lambda x: [v.detach() for v in network(torch.from_numpy(x))], torch  # type: ignore


def torchscript(path: str) -> tuple[Apply, Any]:
    """Likewise of `wsinfer/`, as WSInfer and QuPath apply it."""
    import torch

    network = torch.jit.load(path)

    def apply(x: Any) -> tuple[Any, Any]:
        logits = network(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255).detach()
        return logits.softmax(1)[:, 1], logits[:, 1] - logits[:, 0]

    return apply, torch


def main(kind: str, path: str, images: str, output: str) -> None:
    """Applies the file in batches of one size and a smaller last one."""
    apply, module = {f.__name__: f for f in (onnx, stablehlo, pytorch, torchscript)}[kind](path)
    pixels = np.load(images)
    batches = [pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)]
    results = [[np.asarray(value, np.float64) for value in apply(batch)] for batch in batches]
    probability, logit = (np.concatenate(values) for values in zip(*results, strict=True))
    versions = {module.__name__: module.__version__, "numpy": np.__version__}
    np.savez(output, probability=probability, logit=logit, versions=json.dumps(versions))


if __name__ == "__main__":
    main(*sys.argv[1:])
