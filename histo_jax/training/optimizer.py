"""Optimizer and learning-rate schedule."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

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
    """Returns the optimizer; biases and the parameters of normalisation layers are not decayed.

    `adamw` has the moments of optax (0.9, 0.999, 1e-8: Kingma & Ba 2015, and PyTorch); without
    weight decay it is Adam.

    `muon` orthogonalizes the momentum of each kernel (Jordan et al., "Muon: an optimizer for hidden
    layers in neural networks", 2024). Its updates are scaled to the root mean square of AdamW's, so
    that learning rate and weight decay mean the same (Liu et al., "Muon is scalable for LLM
    training", 2025). Biases, normalisation layers and the layer of the logit follow NAdam
    without weight decay.

    Args:
        config: name, learning rate and weight decay.
        schedule: learning rate of each step; None = constant. The shape of the optimizer state
            does not depend on it.
    """
    schedule = schedule or optax.constant_schedule(config.learning_rate)
    if config.name == "muon":
        return muon(
            schedule,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,  # that of AdamW's updates: Liu et al., section 2.2
        )

    def decay_mask(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.adamw(schedule, weight_decay=config.weight_decay, mask=decay_mask)


def _matrices(params: Any) -> Any:
    """Returns which axes of each kernel are rows and columns of a matrix; None = not a matrix."""

    def axes(leaf: Any) -> MuonDimensionNumbers | None:
        if leaf.ndim < 2 or leaf.shape[-1] == 1:
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map(axes, params)
