"""The folder that `export` writes, as `load` reads it: `config.json` and `model.safetensors`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from histo_jax.config import Config, PredictConfig, set_field
from histo_jax.data.example import PatchSpec
from histo_jax.errors import CheckpointError, UserError, one_line
from histo_jax.metrics import Calibration
from histo_jax.models.forward import Weights
from histo_jax.run.saved_config import LOCATIONS, plain
from histo_jax.version import VERSION

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
_FORMAT = "histo_jax.export"
# Settings that name folders or other runs, which the receiver of an export does not have.
_NOT_SAVED = (
    *LOCATIONS, "data.slide_map", "evaluate.slides", "predict.images", "predict.checkpoints",
    "compare.runs",
)  # fmt: skip
_REPEAT = "copy it again, or rerun --mode=export"


class Network(NamedTuple):
    """A trained network.

    Attributes:
        config: settings of the run that trained it.
        weights: NumPy arrays.
        calibration: fitted to these weights.
        step: training step of the checkpoint.
        fingerprint: of the training and validation examples.
    """

    config: Config
    weights: Weights
    calibration: Calibration
    step: int
    fingerprint: str


class Exported(NamedTuple):
    """What an exported folder computes.

    Attributes:
        networks: one, or those of an ensemble.
        tta: whether logits are means over the symmetries of an image.
        prior: see `predictor.Predictor`.
        patch: of the networks.
        class_names: of label 0 and of label 1.
    """

    networks: Sequence[Network]
    tta: bool
    prior: float | None
    patch: PatchSpec
    class_names: tuple[str, str]

    @property
    def options(self) -> PredictConfig:
        """The settings with which `load` applies the networks."""
        return PredictConfig(tta=self.tta, prior=self.prior)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `config.json`."""
        return {
            "format": _FORMAT,
            "histo_jax": VERSION,
            "class_names": list(self.class_names),
            "patch": self.patch._asdict(),
            "tta": self.tta,
            "prior": self.prior,
            "networks": [_describe(network) for network in self.networks],
        }

    def pack(self) -> bytes:
        """Returns the content of `model.safetensors`: variables by network and path in Flax."""
        tensors = {
            f"{number}.{path}": np.ascontiguousarray(value)
            for number, network in enumerate(self.networks)
            for path, value in traverse_util.flatten_dict(
                network.weights.variables, sep="."
            ).items()
        }
        metadata = {"format": "np", "histo_jax": VERSION}
        return safetensors.numpy.save(tensors, metadata)


def _describe(network: Network) -> dict[str, Any]:
    settings = plain(network.config)
    return {
        "model": {
            name.removeprefix("model."): value
            for name, value in settings.items()
            if name.startswith("model.")
        },
        "mean": np.asarray(network.weights.mean).tolist(),
        "std": np.asarray(network.weights.std).tolist(),
        "calibration": vars(network.calibration),
        "step": network.step,
        "fingerprint": network.fingerprint,
        "settings": {name: settings[name] for name in settings if name not in _NOT_SAVED},
    }


def is_exported(folder: Path) -> bool:
    """Returns whether a folder is one that `export` has written."""
    return read_config(folder).get("format") == _FORMAT


def read_config(folder: Path) -> Mapping[str, Any]:
    """Returns the content of `config.json`, empty where it is missing or corrupt."""
    try:
        values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read(folder: Path) -> Exported:
    """Reads a folder that `is_exported`.

    Raises:
        UserError: a file is missing or corrupt.
    """
    values = read_config(folder)
    try:
        with (folder / WEIGHTS_NAME).open("rb") as file:
            tensors = safetensors.numpy.load(file.read())
        return Exported(
            [_network(each, tensors, number) for number, each in enumerate(values["networks"])],
            bool(values["tta"]),
            values["prior"],
            PatchSpec(**values["patch"]),
            tuple(values["class_names"]),
        )
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {WEIGHTS_NAME}: rerun --mode=export with safetensors among "
            "--config.export.formats"
        ) from None
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} is corrupt ({one_line(error)}): {_REPEAT}") from None


def _network(values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], number: int) -> Network:
    config, prefix = Config(), f"{number}."
    for name, value in values["model"].items():
        set_field(config, f"model.{name}", tuple(value) if isinstance(value, list) else value)
    variables = traverse_util.unflatten_dict(
        {path.removeprefix(prefix): v for path, v in tensors.items() if path.startswith(prefix)},
        sep=".",
    )
    weights = Weights(
        params=variables.pop("params"),
        collections=variables,
        mean=np.array(values["mean"], np.float32),
        std=np.array(values["std"], np.float32),
    )
    calibration = Calibration(**values["calibration"])
    return Network(config, weights, calibration, values["step"], values["fingerprint"])
