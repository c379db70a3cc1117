"""From uint8 images to logits: what training, validation and prediction have in common."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float32, UInt8

from histo_jax import symmetries
from histo_jax.errors import UserError

Images = UInt8[Array, "batch height width 3"]


class Weights(flax.struct.PyTreeNode):
    """Everything that the forward pass of a network needs.

    Attributes:
        params: the network's parameters.
        collections: dict of its other variables by collection, such as `batch_stats`; may be empty.
        mean: float32[3], mean of each channel over the run's training images; 1 = full range.
        std: float32[3], standard deviation of each channel over the same images.
    """

    params: Any
    collections: Any
    mean: Any
    std: Any

    @property
    def variables(self) -> dict[str, Any]:
        """All variables, as Flax takes them."""
        return {"params": self.params, **self.collections}


Forward = Callable[[Weights, Images], Float32[Array, " batch"]]


def normalise(weights: Weights, images: Any) -> Float32[Array, "batch height width 3"]:
    """Scales pixels from 0..255 to the training images' zero mean and unit standard deviation."""
    return (images.astype(jnp.float32) / 255 - weights.mean) / weights.std


def predict_logits(
    model: nn.Module, weights: Weights, images: Float32[Array, "batch height width 3"]
) -> Float32[Array, " batch"]:
    """Returns the logits of normalised images in inference mode: no dropout, no updates.

    Raises:
        UserError: the network does not return one logit per image.
    """
    return check_logits(model, model.apply(weights.variables, images, train=False), images)


def check_logits(model: nn.Module, logits: Any, images: Any) -> Float32[Array, " batch"]:
    """Returns a network's output as float32.

    Raises:
        UserError: it is not one floating-point logit per image.
    """
    shape, dtype = getattr(logits, "shape", None), getattr(logits, "dtype", type(logits).__name__)
    if shape != images.shape[:1] or not jnp.issubdtype(dtype, jnp.floating):
        received = f"{dtype}{list(shape)}" if shape is not None else f"a {dtype}"
        raise UserError(
            f"network {type(model).__name__} returns {received} for images of shape "
            f"{list(images.shape)}; it must return one logit per image, float32[{images.shape[0]}]"
        )
    return logits.astype(jnp.float32)


def make_forward(model: nn.Module, tta: bool = False) -> Forward:
    """Returns the function from weights and uint8 images to logits.

    Args:
        model: maps normalised images to logits.
        tta: test-time augmentation: the logit is the mean over an image's eight symmetries. They
            are computed one after the other; as one batch they would take eight times the memory.
    """

    def forward(weights: Weights, images: Images) -> Float32[Array, " batch"]:
        return predict_logits(model, weights, normalise(weights, images))

    def forward_tta(weights: Weights, images: Images) -> Float32[Array, " batch"]:
        def forward_element(element: Bool[Array, "3"]) -> Float32[Array, " batch"]:
            return forward(weights, symmetries.transform(images, *element))

        return jax.lax.map(forward_element, np.array(symmetries.ELEMENTS)).mean(0)

    return forward_tta if tta else forward


def read_behind(outputs: Iterable[Any], in_flight: int = 2) -> Iterator[Any]:
    """Yields computed values as NumPy arrays, with `in_flight` more already dispatched.

    Reading the newest value would leave the devices idle until the next one is dispatched.

    Args:
        outputs: pytrees of arrays on the devices.
        in_flight: number of outputs that are dispatched and not yet read.
    """
    pending: collections.deque[Any] = collections.deque()
    for output in outputs:
        pending.append(output)
        if len(pending) > in_flight:
            yield jax.tree.map(np.asarray, pending.popleft())
    yield from (jax.tree.map(np.asarray, output) for output in pending)
