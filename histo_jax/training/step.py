"""The compiled steps of training (augmentation to update) and of evaluation."""

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from histo_jax.data.loader import Batch
from histo_jax.distributed.mesh import replicated
from histo_jax.models.forward import (
    Forward,
    Weights,
    check_logits,
    make_forward,
    normalise,
    read_behind,
)
from histo_jax.training.augmentation import Augment, mixup
from histo_jax.training.losses import Loss
from histo_jax.training.state import TrainState, update_ema


def train_logits(
    model: nn.Module,
    weights: Weights,
    images: Float32[Array, "batch height width 3"],
    key: PRNGKeyArray,
) -> tuple[Float32[Array, " batch"], dict[str, Any]]:
    """Returns the logits of normalised images in training mode, and the updated collections.

    Raises:
        UserError: the network does not return one logit per image.
    """
    # Flax takes `params` for random streams of other names, such as those of stochastic depth.
    rngs = {"dropout": key, "params": jax.random.fold_in(key, 1)}
    logits, collections = model.apply(
        weights.variables, images, train=True, mutable=list(weights.collections), rngs=rngs
    )
    return check_logits(model, logits, images), dict(collections)


class Control(enum.IntEnum):
    """Control signal that a process sends with each step; the largest of all processes counts."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2


class Metrics(NamedTuple):
    """Metrics of one training step.

    Attributes:
        loss: mean loss of the batch before the update; of binary cross-entropy in nats.
        finite: whether loss and gradient were finite; if not, no update was applied.
        gradient_norm: global norm of the gradient.
        control: the largest `Control` of all processes.
    """

    loss: Float32[Array, ""]
    finite: Bool[Array, ""]
    gradient_norm: Float32[Array, ""]
    control: Int32[Array, ""]


TrainStep = Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]]


def make_eval_step(model: nn.Module, batch_sharding: NamedSharding) -> Forward:
    """Returns `make_forward` compiled for batches sharded over the mesh; logits are replicated."""
    return jax.jit(make_forward(model), out_shardings=replicated(batch_sharding))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    batch_sharding: NamedSharding,
    augment: Augment,
    loss: Loss,
    ema_decay: float = 0.0,
    mixup_alpha: float = 0.0,
) -> TrainStep:
    """Returns the compiled step `(state, batch) -> (state, metrics)`.

    The batch holds `image`, uint8[batch, size, size, 3], and `label`, float32[batch] of 0 and 1,
    both sharded over the mesh; BatchNorm and loss are computed over the global batch. It may hold
    `control`, int32[devices], sharded likewise. The given state is donated and must not be reused.

    Args:
        model: maps normalised images to logits.
        optimizer: turns gradients into updates.
        batch_sharding: shards a batch over the devices.
        augment: see `make_augment`.
        loss: of each example, see `get_loss`.
        ema_decay: decay of the moving average, used if the state has one.
        mixup_alpha: of `mixup`; 0 = off.
    """

    def train_step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        augment_key, mixup_key, dropout_key = jax.random.split(step_key, 3)
        images = normalise(state.weights, augment(augment_key, batch["image"]))
        labels = batch["label"]
        if mixup_alpha:
            images, labels = mixup(mixup_key, images, labels, mixup_alpha)

        def mean_loss(params: Any) -> tuple[Float32[Array, ""], Any]:
            weights = state.weights.replace(params=params)
            logits, collections = train_logits(model, weights, images, dropout_key)
            return loss(logits, labels).mean(), collections

        (value, collections), gradient = jax.value_and_grad(mean_loss, has_aux=True)(
            state.weights.params
        )
        state, metrics = _update(state, optimizer, value, collections, gradient, ema_decay)
        control = batch.get("control", jnp.zeros(1, jnp.int32)).max()
        return state, Metrics(*metrics, control)

    return jax.jit(train_step, donate_argnums=0, out_shardings=replicated(batch_sharding))


def _update(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    loss: Float32[Array, ""],
    collections: Any,
    gradient: Any,
    ema_decay: float,
) -> tuple[TrainState, tuple[Any, Any, Any]]:
    """Returns the next state, and loss, whether all is finite, and the norm of the gradient."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.weights.params)
    weights = state.weights.replace(
        params=optax.apply_updates(state.weights.params, updates), collections=collections
    )
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updated = state.replace(
        weights=weights,
        ema=update_ema(state.ema, weights, state.step, ema_decay),
        opt_state=opt_state,
        loss_sum=state.loss_sum + loss,
    )
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    return state.replace(step=state.step + 1), (loss, finite, norm)


def collect_logits(
    eval_step: Forward,
    weights: Weights,
    batches: Iterable[Batch],
) -> tuple[Float[np.ndarray, " examples"], Float[np.ndarray, " examples"]]:
    """Returns logits and labels of all examples in order, without padding rows."""
    labels, masks = [], []

    def dispatch() -> Iterator[jax.Array]:
        for batch in batches:
            labels.append(batch["label"])
            masks.append(batch["mask"])
            yield eval_step(weights, batch["image"])

    logits = np.concatenate(list(read_behind(dispatch())))
    used = np.concatenate(masks)
    return logits[used], np.concatenate(labels)[used]
