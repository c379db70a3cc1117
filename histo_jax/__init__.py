"""Train, judge and run patch classifiers for histopathology, in Keras's words.

`fit`, `evaluate` and `predict` take a `Config` and the folder of a run; they are loaded on first
use, so that `import histo_jax` is quick.
"""

from histo_jax import startup

startup.check()

# isort: split
import importlib
import logging
import typing

from histo_jax.config import Config
from histo_jax.errors import ExpectedError

if typing.TYPE_CHECKING:
    from histo_jax.comparison import compare
    from histo_jax.evaluation import evaluate
    from histo_jax.fitting import fit
    from histo_jax.prediction import predict
    from histo_jax.report import explain

__all__ = ["Config", "ExpectedError", "compare", "evaluate", "explain", "fit", "predict"]

# Like Keras, and unlike most libraries, this one shows its progress unasked; silence it with
# `logging.getLogger("histo_jax").setLevel("WARNING")`.
_log = logging.getLogger("histo_jax")
if not _log.handlers:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(message)s"))
    _log.addHandler(_handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False

_HOMES = {
    "compare": "histo_jax.comparison",
    "explain": "histo_jax.report",
    "fit": "histo_jax.fitting",
    "evaluate": "histo_jax.evaluation",
    "predict": "histo_jax.prediction",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'histo_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
