"""The trained network in formats of other programs: ONNX, StableHLO, safetensors, TorchScript.

As a function, `histo_jax.export(config, workdir)` writes them; see `histo_jax.export.export`.
"""

import os
import sys
import types
from pathlib import Path

from histo_jax.config import Config
from histo_jax.export.exporting import export

__all__ = ["export"]


class _Callable(types.ModuleType):
    """Lets `histo_jax.export` be this package and the command: the attribute can be only one."""

    def __call__(self, config: Config, workdir: str | os.PathLike[str]) -> Path:
        """Writes the formats; see `histo_jax.export.export`."""
        return export(config, workdir)


sys.modules[__name__].__class__ = _Callable
