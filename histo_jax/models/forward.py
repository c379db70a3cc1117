"""From uint8 images to logits: the weights of a network and its forward pass.

Shapes of the fields of `Weights` are in its docstring: as annotations they would be checked in
tests, and JAX also fills pytrees with shapes, shardings and tracers.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray, UInt8

from histo_jax import symmetries
from histo_jax.data.example import IMAGE_SHAPE
from histo_jax.errors import UserError

Images = UInt8[Array, "batch height width 3"]
NormalisedImages = Float32[Array, "batch height width 3"]
Logits = Float32[Array, " batch"]


class Weights(flax.struct.PyTreeNode):
    """All variables that a prediction needs.

    Attributes:
        params: the parameters of the network.
        collections: dict of its other variables by collection, such as `batch_stats`; may be empty.
        mean: float32[3], mean of each channel over the training images of the run, 1 = full range.
        std: float32[3], their standard deviation, in the same unit.
    """

    params: Any
    collections: Any
    mean: Any
    std: Any

    @property
    def variables(self) -> dict[str, Any]:
        """All variables in Flax's layout."""
        return {"params": self.params, **self.collections}


Forward = Callable[[Weights, Images], Logits]


def init_weights(
    model: nn.Module,
    key: PRNGKeyArray,
    mean: Float[np.ndarray, "3"],
    std: Float[np.ndarray, "3"],
) -> Weights:
    """Returns random weights.

    Args:
        model: maps normalised images to logits, see `histo_jax.models`.
        key: random key.
        mean: channel means of the training images, 1 = full range.
        std: their standard deviations.
    """
    # Compiled: op by op it would take seconds at every start.
    init = jax.jit(model.init, static_argnames="train")
    variables = init(key, jnp.zeros((1, *IMAGE_SHAPE), jnp.float32), train=False)
    return Weights(
        params=variables.get("params", {}),
        collections={name: values for name, values in variables.items() if name != "params"},
        mean=jnp.asarray(mean, jnp.float32),
        std=jnp.asarray(std, jnp.float32),
    )


def normalise(weights: Weights, images: Any) -> NormalisedImages:
    """Returns images of pixels 0 to 255 scaled to mean 0 and standard deviation 1 per channel."""
    return (images.astype(jnp.float32) / 255 - weights.mean) / weights.std


def predict_logits(model: nn.Module, weights: Weights, images: NormalisedImages) -> Logits:
    """Returns the logits of normalised images in inference mode, that is without dropout.

    Raises:
        UserError: the network does not return one logit per image.
    """
    return _as_logits(model, model.apply(weights.variables, images, train=False), images)


def train_logits(
    model: nn.Module, weights: Weights, images: NormalisedImages, key: PRNGKeyArray
) -> tuple[Logits, dict[str, Any]]:
    """Returns the logits of normalised images in training mode, and the updated collections.

    Raises:
        UserError: the network does not return one logit per image.
    """
    # Flax takes `params` for random streams of other names, such as those of stochastic depth.
    rngs = {"dropout": key, "params": jax.random.fold_in(key, 1)}
    logits, collections = model.apply(
        weights.variables, images, train=True, mutable=list(weights.collections), rngs=rngs
    )
    return _as_logits(model, logits, images), dict(collections)


def _as_logits(model: nn.Module, logits: Any, images: Any) -> Logits:
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", type(logits).__name__)
    if shape != (len(images),) or not jnp.issubdtype(dtype, jnp.floating):
        received = f"{dtype}{list(shape)}" if shape is not None else f"a {dtype}"
        raise UserError(
            f"network {type(model).__name__} returns {received} for images of shape "
            f"{list(images.shape)}; it must return one logit an image, float32[{len(images)}]"
        )
    return logits.astype(jnp.float32)


def make_forward(model: nn.Module, tta: bool = False) -> Forward:
    """Returns the function from weights and uint8 images to logits in inference mode.

    Args:
        model: maps normalised images to logits.
        tta: test-time augmentation: the mean logit of the eight symmetries of an image. They are
            computed one after the other in one program; as one batch they would take eight times
            the memory.
    """

    def forward(weights: Weights, images: Images) -> Logits:
        return predict_logits(model, weights, normalise(weights, images))

    def forward_tta(weights: Weights, images: Images) -> Logits:
        def forward_element(element: Bool[Array, "3"]) -> Logits:
            return forward(weights, symmetries.transform(images, *element))

        return jax.lax.map(forward_element, np.array(symmetries.ELEMENTS)).mean(0)

    return forward_tta if tta else forward
