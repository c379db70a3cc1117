"""Optimizer and learning-rate schedule."""

from typing import Any

import jax
import optax

from histo_jax.config import OptimizerConfig


def create_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, for a training of `steps` steps.

    `one_cycle` is Smith & Topin's ("Super-Convergence", 2018) with cosine annealing: from 1/25 of
    the peak up to the peak, then down to zero.
    """
    if config.schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    return optax.cosine_onecycle_schedule(steps, config.learning_rate, config.warmup)


def create_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Returns AdamW with the moments of optax (0.9, 0.999, 1e-8: Kingma & Ba 2015, and PyTorch).

    Without weight decay it is Adam. Biases and the parameters of normalisation layers are not
    decayed.

    Args:
        config: learning rate and weight decay.
        schedule: learning rate of each step; None = constant. The shape of the optimizer state
            does not depend on it.
    """

    def decay_mask(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    schedule = schedule or optax.constant_schedule(config.learning_rate)
    return optax.adamw(schedule, weight_decay=config.weight_decay, mask=decay_mask)
