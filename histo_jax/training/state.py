"""Training state and early stopping, as explicit pytrees.

Shapes of the fields are in the docstrings: as annotations they would be checked in tests, and
JAX also fills pytrees with shapes, shardings and tracers.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int, PRNGKeyArray

from histo_jax.config import EarlyStoppingConfig
from histo_jax.models.forward import Weights

Channels = Float[np.ndarray | Array, "3"]


class TrainState(flax.struct.PyTreeNode):
    """Everything that the next training step depends on, besides its batch.

    Attributes:
        step: int32[], number of completed steps.
        weights: the trained variables and the normalisation constants.
        ema: exponential moving average of `weights`, or None if none is kept.
        opt_state: state of the optimizer.
        key: uint32[2], random key of the run; the key of a step is folded from it and `step`.
        loss_sum: float32[], sum of the batch losses since the start of the epoch, nats.
    """

    step: Any
    weights: Weights
    ema: Any
    opt_state: optax.OptState
    key: Any
    loss_sum: Any

    @property
    def eval_weights(self) -> Weights:
        """The weights to predict with: the moving average if one is kept."""
        return self.weights if self.ema is None else self.ema


def update_ema(ema: Weights | None, weights: Weights, step: Any, decay: float) -> Weights | None:
    """Returns the moving average after one more step, including BatchNorm statistics.

    The decay grows from `(1 + step) / (10 + step)` to `decay`, so that the initial weights are
    soon forgotten. Integers, such as counters, are copied.
    """
    if ema is None:
        return None
    effective = jnp.minimum(decay, (1 + step) / (10 + step))

    def update_leaf(old: Any, new: Any) -> Any:
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        return (old + (1 - effective) * (new - old)).astype(new.dtype)

    return jax.tree.map(update_leaf, ema, weights)


def init_weights(
    model: nn.Module,
    key: PRNGKeyArray,
    mean: Channels,
    std: Channels,
    image_size: int,
) -> Weights:
    """Returns random weights.

    Args:
        model: maps normalised images to logits, see `histo_jax.models`.
        key: random key.
        mean: channel means of the training images, 1 = full range.
        std: their standard deviations.
        image_size: their height and width in pixels, which may decide the shapes of weights.
    """
    # Compiled: op by op it would take seconds at every start.
    init = jax.jit(model.init, static_argnames="train")
    variables = init(key, jnp.zeros((1, image_size, image_size, 3), jnp.float32), train=False)
    return Weights(
        params=variables.get("params", {}),
        collections={name: values for name, values in variables.items() if name != "params"},
        mean=jnp.asarray(mean, jnp.float32),
        std=jnp.asarray(std, jnp.float32),
    )


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int | Int[Array, ""],
    mean: Channels,
    std: Channels,
    image_size: int,
    has_ema: bool = False,
) -> TrainState:
    """Returns the state before the first step.

    Args:
        model: maps float32 images to logits, see `histo_jax.models`.
        optimizer: its state is initialised.
        seed: of the initial weights, and of the key for augmentation and dropout.
        mean: channel means of the training images, 1 = full range.
        std: their standard deviations.
        image_size: their height and width in pixels, which may decide the shapes of weights.
        has_ema: whether to keep a moving average of the weights.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    weights = init_weights(model, init_key, mean, std, image_size)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        weights=weights,
        # A copy, because the training step donates the buffers of both.
        ema=jax.tree.map(jnp.copy, weights) if has_ema else None,
        opt_state=optimizer.init(weights.params),
        # Raw uint32: a typed key is not a plain array and cannot be checkpointed as one.
        key=jax.random.key_data(key),
        loss_sum=jnp.zeros((), jnp.float32),
    )


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    sharding: Sharding,
    has_ema: bool = False,
) -> TrainState:
    """Returns the shapes and dtypes of `create_state`, each with `sharding`; computes nothing."""
    shapes = jax.eval_shape(
        lambda: create_state(model, optimizer, 0, np.zeros(3), np.ones(3), image_size, has_ema),
    )
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


class EarlyStopping(flax.struct.PyTreeNode):
    """State of early stopping on the validation loss of each epoch; `update` is pure.

    Attributes:
        best_loss: float64[], lowest loss so far, nats; infinity before the first epoch.
        best_step: int32[], its epoch, counted from 1; 0 before the first epoch.
        step: int32[], number of finished epochs.
        patience: epochs without improvement after which training stops.
        min_delta: an improvement is a loss below the best by more than this, nats.
    """

    best_loss: Any
    best_step: Any
    step: Any
    patience: int = flax.struct.field(pytree_node=False)
    min_delta: float = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, config: EarlyStoppingConfig) -> "EarlyStopping":
        """Returns the state before the first epoch."""
        return cls(
            best_loss=np.array(np.inf, np.float64),
            best_step=np.array(0, np.int32),
            step=np.array(0, np.int32),
            patience=config.patience,
            min_delta=config.min_delta,
        )

    @property
    def epochs_without_improvement(self) -> int:
        """Number of epochs since the best one."""
        return int(self.step - self.best_step)

    @property
    def should_stop(self) -> bool:
        """Whether training must stop."""
        return self.epochs_without_improvement >= self.patience


def update(state: EarlyStopping, loss: float) -> EarlyStopping:
    """Returns the state after one more epoch; NaN is never an improvement."""
    step = np.asarray(state.step + 1, np.int32)
    if loss < state.best_loss - state.min_delta:
        return state.replace(step=step, best_step=step, best_loss=np.array(loss, np.float64))
    return state.replace(step=step)
