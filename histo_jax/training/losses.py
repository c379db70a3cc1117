"""The losses that `config.fit.loss` chooses from, each for every example of a batch."""

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
    """Returns the negative log-likelihood of each label, nats; labels may lie between 0 and 1."""
    return optax.sigmoid_binary_cross_entropy(logits, labels)


def get_loss(name: str) -> Loss:
    """Returns the loss registered under `name`; its result is checked when a step is traced."""
    function = LOSSES.get(name)

    def loss(logits: Values, labels: Values) -> Values:
        values = function(logits, labels)
        if jnp.shape(values) != labels.shape:
            raise UserError(
                f"loss {name!r} returns shape {list(jnp.shape(values))} for a batch of "
                f"{len(labels)}; it must return the loss of each example, float32[{len(labels)}]"
            )
        return values.astype(jnp.float32)

    return loss
