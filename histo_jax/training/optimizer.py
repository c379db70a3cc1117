"""What turns gradients into updates."""

from typing import Any

import jax
import optax

from histo_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate of each step of a training of `steps` steps.

    `one_cycle` is Smith & Topin's ("Super-Convergence", 2018), with cosines: from 1/25 of the peak
    up to it, and down to nothing.
    """
    if config.schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    return optax.cosine_onecycle_schedule(steps, config.learning_rate, config.warmup)


def create_optimizer(config: OptimizerConfig, steps: int = 1) -> optax.GradientTransformation:
    """Returns AdamW with optax's moments (0.9, 0.999, 1e-8: Kingma & Ba 2015, and PyTorch's).

    Without weight decay it is Adam. Biases and the parameters of normalisations do not decay.

    Args:
        config: rate, schedule, decay.
        steps: of the whole training, which a schedule depends on; the state's shape does not.
    """

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.adamw(learning_rate(config, steps), weight_decay=config.weight_decay, mask=decays)
