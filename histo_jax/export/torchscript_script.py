"""Writes an exported network as TorchScript: `python FILE FOLDER SIZE TARGET`.

Run in a process of its own, so that PyTorch and JAX do not share one.
"""

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import torch


def main(folder: str, size: str, target: str) -> None:
    """Reads the network of `folder` with its `model.py`, and writes it to `target`."""
    specification = importlib.util.spec_from_file_location("model", f"{folder}/model.py")
    assert specification
    assert specification.loader
    model = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(model)

    class Logits(torch.nn.Module):
        """From float[batch, 3, size, size], 0 to 1, to two logits, whose softmax is correct."""

        def __init__(self) -> None:
            super().__init__()
            self.network = model.load(folder)

        def forward(self, pixels: Any) -> Any:
            logits = self.network.logits(pixels)
            return torch.stack([torch.zeros_like(logits), logits], 1)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # WSInfer and QuPath take no other
        example = torch.zeros(2, 3, int(size), int(size))
        traced = torch.jit.trace(Logits().eval(), example, check_trace=False)
    # Python says why a file cannot be written; PyTorch does not.
    Path(target).write_bytes(traced.save_to_buffer())


if __name__ == "__main__":
    main(*sys.argv[1:])
