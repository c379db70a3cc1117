"""Attribution: how much each pixel contributes to a logit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float32, UInt8

from histo_jax.models.forward import Weights, normalise, predict_logits
from histo_jax.predictor import Predictor

STEPS = 24
# White: glass without tissue, which real patches contain; no patch shows the mean colour.
GLASS = 255.0
# Patches at once, and their pixels: gradients take more memory than predictions.
_BATCH, _PIXELS = 12, 12 * 96 * 96


def attribute(
    predictor: Predictor,
    images: UInt8[np.ndarray, "n height width 3"],
    batch_size: int | None = None,
) -> Float32[np.ndarray, "n height width"]:
    """Returns what each pixel adds to the calibrated logit, without test-time augmentation.

    Args:
        predictor: its networks' attributions are averaged.
        images: RGB patches.
        batch_size: patches at once; each compiles a program. None = as many as memory allows.
    """
    batch_size = batch_size or max(1, min(_BATCH, _PIXELS // predictor.patch.size**2))
    maps = predictor.map(make_attribution, images, batch_size)
    pairs = zip(predictor.trained, maps, strict=True)
    scaled = [trained.calibration.scale * own for trained, own in pairs]
    return np.mean(scaled, axis=0).astype(np.float32)


def make_attribution(model: nn.Module) -> Callable[[Weights, Any], Any]:
    """Returns the function from weights and uint8 images to `integrated_gradients`."""
    return lambda weights, images: integrated_gradients(model, weights, images)[1]


def integrated_gradients(
    model: nn.Module, weights: Weights, images: UInt8[Array, "batch height width 3"]
) -> tuple[Float32[Array, " batch"], Float32[Array, "batch height width"]]:
    """Returns the logits, and what each pixel adds to them on the path from bare glass.

    Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017. The sum of a map is the
    logit of the image minus that of bare glass, up to the discretisation of the integral. On
    synthetic slides, deleting the pixels of highest attribution lowers the logit faster than
    deleting random ones or those of the highest Grad-CAM of any block
    (`tests/report/test_attribution.py`); Grad-CAM won once, for the second block of the
    quickstart's network.
    """
    end = normalise(weights, images)
    start = normalise(weights, jnp.full_like(images, GLASS))

    def sum_logits(x: Any) -> Any:
        logits = predict_logits(model, weights, x)
        return jnp.sum(logits), logits

    def add_gradient(sums: Any, alpha: Any) -> tuple[Any, None]:
        gradient, _ = jax.grad(sum_logits, has_aux=True)(start + alpha * (end - start))
        return sums + gradient, None

    alphas = (jnp.arange(STEPS) + 0.5) / STEPS
    sums, _ = jax.lax.scan(add_gradient, jnp.zeros_like(end), alphas)
    return sum_logits(end)[1], ((end - start) * sums / STEPS).sum(-1)
