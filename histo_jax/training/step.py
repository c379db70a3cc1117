"""The jit-compiled steps: augmentation, forward, loss, gradient, update."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int32

from histo_jax.config import Config
from histo_jax.data.loader import Batch
from histo_jax.training.augmentation import Images, augment, mix, transform
from histo_jax.training.sharding import replicated
from histo_jax.training.state import TrainState, Weights, average

Forward = Callable[[Weights, Images], Float32[Array, " batch"]]


# Whether to transpose, to flip rows, to flip columns: together the eight symmetries of the square.
_SYMMETRIES = np.array(list(itertools.product((False, True), repeat=3)))


def normalise(weights: Weights, images: Any) -> Float32[Array, "batch height width 3"]:
    """Returns pixels, 0 to 255 before, with the training images' mean 0 and deviation 1."""
    return (images.astype(jnp.float32) / 255 - weights.mean) / weights.deviation


def make_forward(model: nn.Module, averaged: bool = False) -> Forward:
    """Returns the function from weights and uint8 images to logits, without dropout.

    Args:
        model: maps normalised images to logits.
        averaged: give the mean of the logits of an image's eight symmetries. One after the other
            in one program: as one batch they would take eight times the memory.
    """

    def forward(weights: Weights, images: Images) -> Float32[Array, " batch"]:
        variables = {"params": weights.params, "batch_stats": weights.batch_stats}
        return model.apply(variables, normalise(weights, images))  # type: ignore[return-value]

    def average(weights: Weights, images: Images) -> Float32[Array, " batch"]:
        logits = jax.lax.map(lambda how: forward(weights, transform(images, *how)), _SYMMETRIES)
        return logits.mean(0)

    return average if averaged else forward


def make_eval_step(model: nn.Module, batched: NamedSharding, averaged: bool = False) -> Forward:
    """Returns `make_forward` compiled for batches divided over the mesh; logits lie everywhere."""
    return jax.jit(make_forward(model, averaged), out_shardings=replicated(batched))


class Metrics(NamedTuple):
    """What is seen of a step.

    Attributes:
        loss: mean binary cross-entropy of the batch before the update, nats.
        finite: whether loss and gradient were finite; if not, nothing was updated.
        gradient_norm: length of the gradient of all parameters together.
        request: the largest of the numbers that the processes gave the step.
    """

    loss: Float32[Array, ""]
    finite: Bool[Array, ""]
    gradient_norm: Float32[Array, ""]
    request: Int32[Array, ""]


def make_train_step(
    config: Config,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    batched: NamedSharding,
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]]:
    """Returns the compiled step `(state, batch) -> (state, metrics)`.

    The batch holds `image`, uint8[batch, 96, 96, 3], and `label`, float32[batch] of 0 and 1, both
    divided over the mesh; BatchNorm and loss see the whole of it; it may hold `request`,
    int32[devices], divided too. The given state is donated: do not use it again.
    """

    def train_step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        augment_key, mix_key, dropout_key = jax.random.split(step_key, 3)
        images = normalise(state.weights, augment(augment_key, batch["image"], config.augment))
        labels = batch["label"]
        if config.augment.mixup:
            images, labels = mix(mix_key, images, labels, config.augment.mixup)

        def loss_of(params: Any) -> tuple[Float32[Array, ""], Any]:
            logits, changed = model.apply(
                {"params": params, "batch_stats": state.weights.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            losses = optax.sigmoid_binary_cross_entropy(logits, labels)
            return losses.mean(), changed["batch_stats"]

        (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state.weights.params
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.weights.params)
        weights = state.weights.replace(
            params=optax.apply_updates(state.weights.params, updates), batch_stats=batch_stats
        )
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updated = state.replace(
            weights=weights,
            averaged=average(state.averaged, weights, state.step, config.optimizer.ema_decay),
            opt_state=opt_state,
            loss_sum=state.loss_sum + loss,
        )
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        request = batch.get("request", jnp.zeros(1, jnp.int32)).max()
        return state.replace(step=state.step + 1), Metrics(loss, finite, norm, request)

    return jax.jit(train_step, donate_argnums=0, out_shardings=replicated(batched))


def read_behind(outputs: Iterable[jax.Array], steps: int = 2) -> Iterator[np.ndarray]:
    """Yields what the devices compute, each when `steps` more are started, so none stands idle."""
    waiting: collections.deque[jax.Array] = collections.deque()
    for output in outputs:
        waiting.append(output)
        if len(waiting) > steps:
            yield np.asarray(waiting.popleft())
    yield from map(np.asarray, waiting)


def collect_logits(
    eval_step: Forward,
    weights: Weights,
    batches: Iterable[Batch],
) -> tuple[Float[np.ndarray, " examples"], Float[np.ndarray, " examples"]]:
    """Returns logits and labels of all examples in order, each once: filled-up rows are dropped."""
    labels, masks = [], []

    def started() -> Iterator[jax.Array]:
        for batch in batches:
            labels.append(batch["label"])
            masks.append(batch["mask"])
            yield eval_step(weights, batch["image"])

    logits = np.concatenate(list(read_behind(started())))
    used = np.concatenate(masks)
    return logits[used], np.concatenate(labels)[used]
