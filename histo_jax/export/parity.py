"""`parity.json`: how far each exported file is from the predictor, and whether that is enough."""

import importlib.util
import io
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from histo_jax.distributed import runtime
from histo_jax.errors import CheckpointError, ParityError
from histo_jax.export import processes
from histo_jax.export.function import precise_logits
from histo_jax.predictor import Predictor, load
from histo_jax.run import files as run_files

PARITY_NAME = "parity.json"
# Largest difference of a logit, relative to its absolute value where that is above 1.
_TOLERANCES = {
    "onnx": 1e-4,
    "stablehlo": 1e-5,
    "safetensors": 1e-5,
    "pytorch": 1e-4,
    "torchscript": 1e-4,
}


class Patches(NamedTuple):
    """The images on which the files are compared.

    Attributes:
        images: uint8[n, size, size, 3].
        source: what they are, for people.
    """

    images: np.ndarray
    source: str


def measure(predictor: Predictor, patches: Patches, files: dict[str, Path]) -> dict[str, Any]:
    """Returns the content of `parity.json`.

    Args:
        predictor: what the files must compute.
        patches: compared on these.
        files: by format; for safetensors its folder.

    Raises:
        CheckpointError: the predictor's own logits are not finite.
        ParityError: a file computes something else, or cannot be used.
        OSError: a temporary file cannot be written.
    """
    expected = _reference(predictor, patches)
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images.npy"
        content = io.BytesIO()  # NumPy's own error on a full disk names no file
        np.save(content, patches.images)
        run_files.write_bytes(images, content.getvalue())
        formats = {
            name: _compare(name, expected, *_apply(name, path, patches.images, images))
            for name, path in files.items()
        }
    own = predictor.logits(patches.images)
    return {
        "patches": {"source": patches.source, "count": len(patches.images)},
        # Where the predictor computes in bfloat16, it differs more from its own weights' function
        # than the files do.
        "reference": "the predictor in float32 with ordinary convolutions",
        "predictor_here": {
            "largest_difference_in_logit": float(np.abs(own - expected).max()),
            "versions": runtime.versions(),
        },
        "formats": formats,
    }


def _reference(predictor: Predictor, patches: Patches) -> np.ndarray:
    logits = precise_logits(predictor, patches.images)
    if infinite := int((~np.isfinite(logits)).sum()):
        raise CheckpointError(
            f"{' and '.join(each.run for each in predictor.trained)}: the logits of {infinite} of "
            f"{len(logits)} patches are not finite: leave out --config.predict.prior if it is set, "
            "or train again"
        )
    return logits


def check(parity: dict[str, Any]) -> None:
    """Refuses files that compute something else.

    Raises:
        ParityError: names the formats and their differences.
    """
    failed = [
        f"{name} by {values['largest_relative_difference']:.1e} (allowed: {values['tolerance']})"
        for name, values in parity["formats"].items()
        if not values["largest_relative_difference"] <= values["tolerance"]
    ]
    if failed:
        raise ParityError(
            f"the export differs from the predictor in a logit: {', '.join(failed)}; nothing was "
            "written: leave the format out of --config.export.formats, and report this"
        )


def has_pytorch() -> bool:
    """Returns whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def _apply(
    name: str, path: Path, images: np.ndarray, images_path: Path
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Returns probabilities, logits and versions of an exported file."""
    if name == "safetensors":
        logits = precise_logits(load(path), images)
        return expit(logits), logits, {}
    output = images_path.with_name(f"{name}.npz")
    try:
        with run_files.disk_errors(output.parent):
            processes.run("parity_script.py", name, path, images_path, output)
    except processes.ProcessError as error:
        raise ParityError(f"{path.name} was written but cannot be used: {error}") from None
    with np.load(output) as result:
        versions = json.loads(str(result["versions"]))
        return result["probability"], result["logit"], versions


def _compare(
    name: str,
    expected: np.ndarray,
    probabilities: np.ndarray,
    logits: np.ndarray,
    versions: dict[str, str],
) -> dict[str, Any]:
    difference = np.abs(logits - expected)
    relative = difference / np.maximum(1, np.abs(expected))
    return {
        "largest_difference_in_probability": float(np.abs(probabilities - expit(expected)).max()),
        "largest_difference_in_logit": float(difference.max()),
        "largest_relative_difference": float(relative.max()),
        "tolerance": _TOLERANCES[name],
        "versions": versions,
    }
