"""`wsinfer/`: the predictor in the format of WSInfer, which QuPath's extension reads, too."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from histo_jax.errors import ConfigError, UserError
from histo_jax.export import processes, safetensors
from histo_jax.exported import Exported
from histo_jax.run import files

MODEL_NAME, CONFIG_NAME = "torchscript_model.pt", "config.json"


def check(exported: Exported) -> None:
    """Refuses what the format cannot hold.

    Raises:
        UserError: a network is not one of the package, or the width of a pixel is not known.
    """
    if not safetensors.has_pytorch(exported):
        raise UserError(
            "TorchScript cannot hold a registered network: leave torchscript out of "
            "--config.export.formats"
        )
    if exported.patch.mpp is None:
        raise UserError(
            "WSInfer needs the width of a pixel, which is not known: set --config.data.mpp, or "
            "leave torchscript out of --config.export.formats"
        )


def check_installed() -> None:
    """Refuses to start without PyTorch.

    Raises:
        ConfigError: names the command that installs it.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "config.export.formats: torchscript needs PyTorch, which is not installed: "
            "pip install 'histo_jax[torch]'"
        )


def write(folder: Path, exported: Exported, weights: bytes) -> None:
    """Writes the network, with two logits `[0, logit]`, and its description.

    WSInfer and QuPath apply a softmax, and that of these two is the sigmoid of the logit.

    Args:
        folder: is made.
        exported: what the files compute.
        weights: result of `exported.pack()`.

    Raises:
        UserError: PyTorch cannot convert the network.
        OSError: a file cannot be written.
    """
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        safetensors.write(Path(temporary), exported, weights)
        target = folder / MODEL_NAME
        try:
            with files.disk_errors(target):
                processes.run("torchscript_script.py", temporary, exported.patch.size, target)
        except processes.ProcessError as error:
            raise UserError(f"TorchScript was not written: {error}") from None
    files.write_json(folder / CONFIG_NAME, describe(exported))


def describe(exported: Exported) -> dict[str, Any]:
    """Returns the description in the schema of WSInfer-zoo."""
    size = exported.patch.size
    architectures = dict.fromkeys(network.config.model.name for network in exported.networks)
    return {
        "spec_version": "1.0",
        "architecture": "+".join(architectures),
        "num_classes": 2,
        "patch_size_pixels": size,
        "spacing_um_px": exported.patch.mpp,
        "class_names": list(exported.class_names),
        "transform": [
            {"name": "Resize", "arguments": {"size": size}},
            {"name": "ToTensor"},
            # The network normalises by itself, each of an ensemble by its own constants.
            {"name": "Normalize", "arguments": {"mean": [0.0] * 3, "std": [1.0] * 3}},
        ],
    }
