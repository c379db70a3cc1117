"""Which pixels a logit hangs on."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float32, UInt8

from histo_jax.models.forward import Weights, normalise, predict_logits

STEPS = 24
# White: glass without tissue, which patches do show; the mean colour is nothing that is seen.
GLASS = 255.0


def integrated_gradients(
    model: nn.Module, weights: Weights, images: UInt8[Array, "batch height width 3"]
) -> tuple[Float32[Array, " batch"], Float32[Array, "batch height width"]]:
    """Returns the logits, and what each pixel adds to its image's on the way from bare glass.

    Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017. A map's sum is the logit
    less that of bare glass, up to the steps of the integral. On drawn slides, wiping away what it
    marks lowers the logit faster than wiping anywhere and than what Grad-CAM of any block marks
    (`tests/report/test_saliency.py`); Grad-CAM won once, of the second block of the quickstart's
    network.
    """
    end = normalise(weights, images)
    start = normalise(weights, jnp.full_like(images, GLASS))

    def total(x: Any) -> Any:
        logits = predict_logits(model, weights, x)
        return jnp.sum(logits), logits

    def add(sums: Any, share: Any) -> tuple[Any, None]:
        return sums + jax.grad(total, has_aux=True)(start + share * (end - start))[0], None

    shares = (jnp.arange(STEPS) + 0.5) / STEPS
    sums, _ = jax.lax.scan(add, jnp.zeros_like(end), shares)
    return total(end)[1], ((end - start) * sums / STEPS).sum(-1)
