"""The folder that `export` writes, as `load` reads it: `config.json` and `model.safetensors`."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from histo_jax.config import Config, PredictConfig, set_field
from histo_jax.data.example import PatchSpec
from histo_jax.errors import CheckpointError, UserError, one_line
from histo_jax.metrics import Calibration
from histo_jax.models import create_model
from histo_jax.models.forward import Weights
from histo_jax.registry import MODELS
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
            f"{number}.{name}": _array(value)
            for number, network in enumerate(self.networks)
            for name, value in _by_name(network.weights.variables).items()
        }
        metadata = {"format": "np", "histo_jax": VERSION}
        return safetensors.numpy.save(tensors, metadata)


def _by_name(variables: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, such as `params.Dense_0.kernel`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }


def _array(value: Any) -> np.ndarray:
    """Returns a value as NumPy and its file format hold it: contiguous, bfloat16 as float32."""
    # `ascontiguousarray` would make a scalar a vector.
    array = np.array(value, order="C")
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


def digest(values: Mapping[str, Any], weights: bytes) -> str:
    """Returns the SHA-256 of what `config.json` and `model.safetensors` say.

    Args:
        values: content of `config.json`; its own `sha256` is left out.
        weights: content of `model.safetensors`.
    """
    rest = {name: value for name, value in values.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.sha256(text.encode() + weights).hexdigest()


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
        UserError: a file is missing or was changed, or a network is not registered here.
    """
    values = read_config(folder)
    try:
        weights = (folder / WEIGHTS_NAME).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {WEIGHTS_NAME}: rerun --mode=export with safetensors among "
            "--config.export.formats"
        ) from None
    if values.get("sha256") != digest(values, weights):
        raise CheckpointError(
            f"{folder} is corrupt ({CONFIG_NAME} or {WEIGHTS_NAME} is not as it was exported): "
            f"{_REPEAT}"
        )
    try:
        tensors = safetensors.numpy.load(weights)
        patch = PatchSpec(**values["patch"])
        return Exported(
            [
                _network(folder, each, tensors, number, patch.size)
                for number, each in enumerate(values["networks"])
            ],
            values["tta"],
            values["prior"],
            patch,
            tuple(values["class_names"]),
        )
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} is corrupt ({one_line(error)}): {_REPEAT}") from None


def _network(
    folder: Path,
    values: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    number: int,
    size: int,
) -> Network:
    config = Config()
    for name, value in values["model"].items():
        set_field(config, f"model.{name}", tuple(value) if isinstance(value, list) else value)
    variables = _variables(folder, config, tensors, f"{number}.", size)
    weights = Weights(
        params=variables.pop("params", {}),
        collections=variables,
        mean=np.array(values["mean"], np.float32),
        std=np.array(values["std"], np.float32),
    )
    calibration = Calibration(**values["calibration"])
    return Network(config, weights, calibration, values["step"], values["fingerprint"])


def _variables(
    folder: Path, config: Config, tensors: Mapping[str, np.ndarray], prefix: str, size: int
) -> dict[str, Any]:
    """Returns a network's variables, in the structure that its code gives them.

    Raises:
        UserError: the network is not registered, or its code has other variables.
    """
    name = config.model.name
    if name not in MODELS.names():
        raise UserError(
            f"{folder} needs the network {name!r}, which is not registered: import the module "
            "that registers it first"
        )
    init = functools.partial(create_model(config.model).init, train=False)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    like = jax.eval_shape(init, jax.random.key(0), images)
    own = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    leaves = _by_name(like)
    for key in sorted(own.keys() | leaves.keys()):
        saved, expected = (getattr(each.get(key), "shape", "missing") for each in (own, leaves))
        if saved != expected:
            raise CheckpointError(
                f"{folder} was exported with other code of the network {name!r}: {key} is "
                f"{saved} there and {expected} here; register that code"
            )
    arrays = [own[key].astype(leaf.dtype) for key, leaf in leaves.items()]
    filled: dict[str, Any] = jax.tree.unflatten(jax.tree.structure(like), arrays)
    return filled
