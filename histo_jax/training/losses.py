"""The losses that `config.fit.loss` selects; each returns one value per example."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from histo_jax.errors import UserError
from histo_jax.registry import LOSSES, register_loss

Values = Float32[Array, " batch"]
Loss = Callable[[Values, Values], Values]


@register_loss("binary_cross_entropy")
def binary_cross_entropy(logits: Values, labels: Values) -> Values:
    """Returns the negative log-likelihood of each label, nats; labels may be fractions."""
    return optax.sigmoid_binary_cross_entropy(logits, labels)


def get_loss(name: str) -> Loss:
    """Returns the loss registered under `name`; tracing it checks the shape of its result."""
    function = LOSSES.get(name)

    def loss(logits: Values, labels: Values) -> Values:
        values = function(logits, labels)
        if jnp.shape(values) != labels.shape:
            raise UserError(
                f"loss {name!r} returns shape {list(jnp.shape(values))} for a batch of "
                f"{len(labels)}; it must return one loss per example, float32[{len(labels)}]"
            )
        return values.astype(jnp.float32)

    return loss
