"""`model.safetensors`, `config.json` and `model.py`: the weights, and how to apply them.

The weights are Flax's own, so that `histo_jax.load` reads any network. `model.py` applies the
package's networks in PyTorch; a registered network has none.
"""

from pathlib import Path

from histo_jax.exported import CONFIG_NAME, WEIGHTS_NAME, Exported, digest
from histo_jax.registry import MODELS
from histo_jax.run import files

MODEL_NAME = "model.py"
# Not a module of this package: PyTorch need not be installed.
_CODE = Path(__file__).with_name("pytorch_model.py")


def write(folder: Path, exported: Exported, weights: bytes) -> None:
    """Writes the three files.

    Args:
        folder: exists.
        exported: what the files compute.
        weights: result of `exported.pack()`.

    Raises:
        OSError: a file cannot be written.
    """
    write_config(folder, exported, weights)
    files.write_bytes(folder / WEIGHTS_NAME, weights)
    if has_pytorch(exported):
        files.write_bytes(folder / MODEL_NAME, _CODE.read_bytes())


def write_config(folder: Path, exported: Exported, weights: bytes) -> None:
    """Writes `config.json` alone, which every export has; for arguments see `write`."""
    values = exported.to_json()
    files.write_json(folder / CONFIG_NAME, values | {"sha256": digest(values, weights)})


def has_pytorch(exported: Exported) -> bool:
    """Returns whether `model.py` knows all networks."""
    return all(MODELS.is_built_in(network.config.model.name) for network in exported.networks)
