"""Whether a network, an augmentation and a loss do what training needs, before any data is read.

Nothing is computed: JAX traces them.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from histo_jax.config import AugmentConfig, FitConfig, ModelConfig
from histo_jax.data.example import IMAGE_SHAPE
from histo_jax.errors import UserError, one_line
from histo_jax.models import create_model
from histo_jax.models.forward import normalise, predict_logits
from histo_jax.registry import LOSSES, MODELS
from histo_jax.training.augmentation import make_augment
from histo_jax.training.losses import get_loss
from histo_jax.training.state import init_weights
from histo_jax.training.step import train_logits

_BATCH = 2
_PACKAGE = Path(__file__).parents[1]


def check_parts(model_config: ModelConfig, augmentation: AugmentConfig, fit: FitConfig) -> None:
    """Traces the network, the augmentations and the loss that a config chooses.

    Raises:
        UserError: one of them does not exist, fails, or returns another shape than it must; or
            the network has no parameters, or changes the structure of its variables.
    """
    model, loss = create_model(model_config), get_loss(fit.loss)
    if (
        MODELS.is_built_in(model_config.name) and not model_config.kwargs
        and LOSSES.is_built_in(fit.loss) and not augmentation.extra
    ):  # fmt: skip
        return  # the package's tests trace these; here it would cost each start half a second
    images = jax.ShapeDtypeStruct((_BATCH, *IMAGE_SHAPE), jnp.uint8)
    labels = jax.ShapeDtypeStruct((_BATCH,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    name = f"augmentation {' or '.join(map(repr, augmentation.extra))}"
    augmented = _trace(name, make_augment(augmentation), key, images)
    name = f"network {model_config.name!r}"
    weights = _trace(name, lambda key: init_weights(model, key, np.zeros(3), np.ones(3)), key)
    if not jax.tree.leaves(weights.params):
        raise UserError(f"{name} has no parameters to train")
    images = _trace("normalisation", normalise, weights, augmented)
    logits, collections = _trace(
        name, lambda *arguments: train_logits(model, *arguments), weights, images, key
    )
    _trace(name, lambda *arguments: predict_logits(model, *arguments), weights, images)
    if _describe(collections) != _describe(weights.collections):
        raise UserError(
            f"{name} changes shapes or types of its variables ({', '.join(collections)}) in "
            "training: they must stay the same from step to step"
        )
    _trace(f"loss {fit.loss!r}", loss, logits, labels)


def _trace(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the shapes that a function returns; what it raises becomes one line."""
    try:
        return jax.eval_shape(function, *arguments)
    except UserError:
        raise
    except Exception as error:  # whatever the code of others raises
        raise UserError(
            f"{name} fails: {type(error).__name__}: {one_line(error)}{_location(error)}"
        ) from error


def _location(error: BaseException) -> str:
    """Returns the last line outside of libraries that raised an error, for the end of a message."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if "site-packages" not in path.parts and _PACKAGE not in path.parents:
            return f" ({path.name}, line {frame.lineno})"
    return ""


def _describe(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
