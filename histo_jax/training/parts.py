"""The network, augmentation and loss that a config selects: built once and checked.

The checks run before any data is read and compute nothing: JAX only traces the functions.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from histo_jax.config import AugmentConfig, FitConfig, ModelConfig
from histo_jax.errors import ConfigError, UserError, one_line
from histo_jax.models import create_model
from histo_jax.models.forward import normalise, predict_logits
from histo_jax.registry import LOSSES, MODELS
from histo_jax.training.augmentation import Augment, make_augment
from histo_jax.training.losses import Loss, get_loss
from histo_jax.training.state import init_weights
from histo_jax.training.step import train_logits

_BATCH = 2
_PACKAGE = Path(__file__).parents[1]


class Parts(NamedTuple):
    """What a config selects by name.

    Attributes:
        model: maps normalised images to logits.
        augment: see `make_augment`.
        loss: see `get_loss`.
    """

    model: nn.Module
    augment: Augment
    loss: Loss


def build_parts(model: ModelConfig, augment: AugmentConfig, fit: FitConfig) -> Parts:
    """Builds the network, the augmentations and the loss.

    Raises:
        UserError: one of them does not exist, or does not take its settings.
    """
    return Parts(create_model(model), make_augment(augment), get_loss(fit.loss))


def check_parts(
    parts: Parts, model: ModelConfig, augment: AugmentConfig, fit: FitConfig, image_size: int
) -> None:
    """Checks what `build_parts` has built, for images of this height and width.

    Raises:
        UserError: a part fails, or returns the wrong shape; or the network has no parameters,
            changes the structure of its variables, or does not take the crops of `fit`.
    """
    is_built_in = (
        MODELS.is_built_in(model.name)
        and not model.kwargs
        and LOSSES.is_built_in(fit.loss)
        and not augment.extra
    )
    if not is_built_in:  # the tests of the package trace these; here it would take half a second
        _check(parts, model.name, augment.extra, fit.loss, image_size, image_size)
    if fit.crop_epochs:
        _check_crop_fields(fit, image_size)
        try:
            _check(parts, model.name, augment.extra, fit.loss, image_size, fit.crop_size)
        except UserError as error:
            raise ConfigError(
                f"config.fit.crop_size = {fit.crop_size}: {error}: set config.fit.crop_epochs=0, "
                "or use parts for images of any size, such as model.name='five_block_p4m'"
            ) from error


def _check_crop_fields(fit: FitConfig, image_size: int) -> None:
    if fit.crop_size >= image_size:
        raise ConfigError(
            f"config.fit.crop_size = {fit.crop_size} must be less than the {image_size} pixels of "
            "a patch: lower it, or set config.fit.crop_epochs=0"
        )
    if fit.crop_epochs >= fit.epochs:
        raise ConfigError(
            f"config.fit.crop_epochs = {fit.crop_epochs} must be less than config.fit.epochs = "
            f"{fit.epochs}, so that the last epochs train on whole patches: lower it, or raise "
            "config.fit.epochs"
        )


def _check(
    parts: Parts,
    model: str,
    augmentations: tuple[str, ...],
    loss: str,
    image_size: int,
    input_size: int,
) -> None:
    """Traces training and prediction on images of `input_size`, of a network for `image_size`."""
    images = jax.ShapeDtypeStruct((_BATCH, input_size, input_size, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((_BATCH,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    name = f"augmentation {' or '.join(map(repr, augmentations))}"
    augmented = _trace(name, parts.augment, key, images)
    name = f"network {model!r}"
    weights = _trace(
        name,
        lambda key: init_weights(parts.model, key, np.zeros(3), np.ones(3), image_size),
        key,
    )
    if not jax.tree.leaves(weights.params):
        raise ConfigError(f"{name} has no parameters to train")
    images = _trace("normalisation", normalise, weights, augmented)
    logits, collections = _trace(
        name, lambda *arguments: train_logits(parts.model, *arguments), weights, images, key
    )
    _trace(name, lambda *arguments: predict_logits(parts.model, *arguments), weights, images)
    if _shapes(collections) != _shapes(weights.collections):
        raise ConfigError(
            f"{name} changes shapes or dtypes of its variables ({', '.join(collections)}) in "
            "training: keep them the same in every step"
        )
    _trace(f"loss {loss!r}", parts.loss, logits, labels)


def _trace(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the shapes that a function returns; raises its errors as one line."""
    try:
        return jax.eval_shape(function, *arguments)
    except UserError:
        raise
    except Exception as error:  # user code may raise anything
        raise ConfigError(
            f"{name} fails: {type(error).__name__}: {one_line(error)}{_location(error)}"
        ) from error


def _location(error: BaseException) -> str:
    """Returns the last line of user code in a traceback, to be appended to a message."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if "site-packages" not in path.parts and _PACKAGE not in path.parents:
            return f" ({path.name}, line {frame.lineno})"
    return ""


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
