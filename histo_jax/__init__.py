"""Trains, evaluates and applies patch classifiers for histopathology, in Keras's words.

The commands, such as `fit`, `evaluate` and `predict`, take a `Config` and the folder of a run;
they are imported on first use, so that `import histo_jax` is fast.
"""

from histo_jax import startup

startup.check()

# isort: split
import importlib
import logging
import typing

from histo_jax import environment
from histo_jax.config import Config
from histo_jax.errors import CheckpointError, ConfigError, DataError, ParityError, UserError
from histo_jax.registry import (
    register_augmentation,
    register_loss,
    register_model,
    register_source,
)
from histo_jax.version import VERSION

if typing.TYPE_CHECKING:
    from histo_jax.auditing import audit
    from histo_jax.comparison import compare
    from histo_jax.data.example import Example
    from histo_jax.evaluation import evaluate
    from histo_jax.export import export
    from histo_jax.fitting import fit
    from histo_jax.prediction import predict
    from histo_jax.predictor import Predictor, load
    from histo_jax.preparation import prepare
    from histo_jax.recipes import recipe
    from histo_jax.report import explain, report
    from histo_jax.training.callbacks import Callback
    from histo_jax.wsi.heatmap import heatmap

__version__ = VERSION
__all__ = [
    "Callback",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "Example",
    "ParityError",
    "Predictor",
    "UserError",
    "audit",
    "compare",
    "evaluate",
    "explain",
    "export",
    "fit",
    "heatmap",
    "load",
    "predict",
    "prepare",
    "recipe",
    "register_augmentation",
    "register_loss",
    "register_model",
    "register_source",
    "report",
]

# A program chooses where this package logs; the command line shows it on stderr.
logging.getLogger("histo_jax").addHandler(logging.NullHandler())

_HOMES = {
    "Callback": "histo_jax.training.callbacks",
    "Example": "histo_jax.data.example",
    "Predictor": "histo_jax.predictor",
    "audit": "histo_jax.auditing",
    "compare": "histo_jax.comparison",
    "explain": "histo_jax.report",
    "export": "histo_jax.export",
    "fit": "histo_jax.fitting",
    "evaluate": "histo_jax.evaluation",
    "heatmap": "histo_jax.wsi.heatmap",
    "load": "histo_jax.predictor",
    "predict": "histo_jax.prediction",
    "prepare": "histo_jax.preparation",
    "recipe": "histo_jax.recipes",
    "report": "histo_jax.report",
}
_WITHOUT_JAX = ("histo_jax.data.example", "histo_jax.recipes")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'histo_jax' has no attribute {name!r}")
    module = _HOMES[name]
    is_light = module in _WITHOUT_JAX
    loaded = importlib.import_module(module) if is_light else environment.load(module)
    return getattr(loaded, name)
