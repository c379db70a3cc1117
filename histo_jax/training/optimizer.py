"""What turns gradients into updates."""

import optax

from histo_jax.config import OptimizerConfig


def create_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Adam with optax's moments (0.9, 0.999, 1e-8: Kingma & Ba 2015, and PyTorch's)."""
    return optax.adam(config.learning_rate)
