"""histo_jax, called through the functions that `fit` and `predict` consist of."""

import collections
import functools
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from worker import Task

from histo_jax.config import Config
from histo_jax.data.records import Prepared
from histo_jax.distributed import mesh, runtime
from histo_jax.models import create_model
from histo_jax.preparation import prepare
from histo_jax.training.augmentation import make_augment
from histo_jax.training.losses import get_loss
from histo_jax.training.optimizer import create_optimizer
from histo_jax.training.placement import Dataset, place
from histo_jax.training.state import create_state
from histo_jax.training.step import make_forward, make_train_step

logging.set_verbosity(logging.FATAL)  # as histo_jax.main does
PLACEMENTS = ("device", "host", "disk")  # the fastest first


class Peer:
    def __init__(self, task: Task) -> None:
        runtime.set_up()  # as every command does; on CPU it makes the allocator keep freed memory
        self._task = task
        self._folder = Path(task.folder)
        self._batch_sharding = mesh.batch_sharding()
        self._config = Config()
        model = self._config.model
        model.features = tuple(task.features)
        model.dense, model.dropout = task.dense, task.dropout
        self._config.optimizer.learning_rate = task.learning_rate
        self._model = create_model(model)

    def hello(self) -> dict[str, Any]:
        return {
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
            "device": jax.devices()[0].device_kind,
            "placements": PLACEMENTS,
        }

    def device_memory(self) -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self._training[1].weights.params))

    @cached_property
    def _training(self) -> list[Any]:
        """The train step, and the state, which each step replaces."""
        optimizer = create_optimizer(self._config.optimizer)
        state = create_state(self._model, optimizer, 0, np.full(3, 0.5), np.full(3, 0.25), 96)
        state = jax.device_put(state, mesh.replicated(self._batch_sharding))
        augment, loss = make_augment(self._config.augment), get_loss(self._config.fit.loss)
        return [make_train_step(self._model, optimizer, self._batch_sharding, augment, loss), state]

    @cached_property
    def _prepared(self) -> Prepared:
        return self._prepare("kaggle", "kaggle", "records")

    @functools.cache  # noqa: B019 (a peer lives as long as its process)
    def _resident(self, batch_size: int) -> dict[str, Any]:
        """One batch on the device."""
        images, labels = self._task.images(), self._task.labels()
        batch = {"image": images[:batch_size], "label": labels[:batch_size]}
        return jax.device_put(batch, self._batch_sharding)

    def _train(self, batches: Iterator[Any], steps: int) -> None:
        """As in `fit`: at most two steps in flight, and each one checked to be finite."""
        train_step, state = self._training
        in_flight = collections.deque()
        for _ in range(steps):
            state, metrics = train_step(state, next(batches))
            in_flight.append(metrics.finite)
            if len(in_flight) > 2:
                assert in_flight.popleft()
        self._training[1] = jax.block_until_ready(state)

    @functools.cache  # noqa: B019
    def _placed(self, placement: str, epoch: int) -> Dataset:
        rows = np.resize(np.arange(self._task.epoch), epoch)
        return place(placement, [self._prepared.records("train", rows)], 96, self._batch_sharding)[
            0
        ]

    def _batches(self, placement: str, batch_size: int, epoch: int) -> Iterator[Any]:
        """Yields batches on the device."""
        return self._placed(placement, epoch).training_batches(batch_size, seed=0, first_step=0)

    def train(self, variant: str, batch_size: int, steps: int) -> None:
        batch = self._resident(batch_size)
        self._train(itertools.repeat(batch), steps)

    def epoch(self, placement: str, batch_size: int, epoch: int) -> None:
        self._train(self._batches(placement, batch_size, epoch), epoch // batch_size)

    def input(self, placement: str, batch_size: int, epoch: int) -> None:
        batches = self._batches(placement, batch_size, epoch)
        for _ in range(epoch // batch_size):
            jax.block_until_ready(next(batches))

    @cached_property
    def _forwards(self) -> dict[str, Any]:
        return {
            variant: jax.pmap(
                make_forward(self._model, variant == "tta"),
                in_axes=(None, 0),
                devices=jax.local_devices(),
            )
            for variant in ("plain", "tta")
        }

    @functools.cache  # noqa: B019
    def _split(self, batch_size: int) -> jax.Array:
        """The images of the resident batch, split over the devices for pmap."""
        images = self._resident(batch_size)["image"]
        return images.reshape(jax.local_device_count(), -1, *images.shape[1:])

    def predict(self, variant: str, batch_size: int, batches: int) -> None:
        images, weights = self._split(batch_size), self._training[1].weights
        outputs = [self._forwards[variant](weights, images) for _ in range(batches)]
        np.concatenate(outputs)

    def _prepare(self, source: str, raw_dir: str, tfds_dir: str) -> Prepared:
        config = Config()
        config.data.source, config.data.raw_dir = source, str(self._folder / raw_dir)
        config.data.tfds_dir = str(self._folder / tfds_dir)
        return prepare(config)

    def prepare(self, source: str, raw_dir: str, tfds_dir: str) -> None:
        """Prepares the records, also if they exist."""
        shutil.rmtree(self._folder / tfds_dir, ignore_errors=True)
        self._prepare(source, raw_dir, tfds_dir)

    def first_epoch(self, folder: str, batch_size: int) -> None:
        """Prepares the records of class folders, places them, and takes all batches."""
        self._image_batches.cache_clear()
        shutil.rmtree(self._folder / f"{folder}_records", ignore_errors=True)
        self.next_epoch(folder, batch_size)

    def next_epoch(self, folder: str, batch_size: int) -> None:
        """Takes the batches of another epoch."""
        batches, steps = self._image_batches(folder, batch_size)
        for _ in range(steps):
            jax.block_until_ready(next(batches))

    @functools.cache  # noqa: B019
    def _image_batches(self, folder: str, batch_size: int) -> tuple[Iterator[Any], int]:
        """Returns the batches on the device, and their number in an epoch."""
        prepared = self._prepare("images", folder, f"{folder}_records")
        rows = np.arange(len(prepared.tables["train"]))
        records = prepared.records("train", rows)
        dataset = place("auto", [records], prepared.image_size, self._batch_sharding)[0]
        return dataset.training_batches(batch_size, 0, 0), len(rows) // batch_size

    def read(self, source: str, raw_dir: str, tfds_dir: str, batch_size: int, steps: int) -> None:
        """Reads batches of records in the order of training, as placement `disk` does."""
        prepared = self._prepare(source, raw_dir, tfds_dir)
        rows = np.arange(len(prepared.tables["train"]))
        subset = prepared.records("train", rows)
        batches = place("disk", [subset], 96, self._batch_sharding)[0].training_batches(
            batch_size, 0, 0
        )
        for _ in range(steps):
            next(batches)

    def matrix_rate(self, size: int) -> float:
        """Operations per second of a large matrix product, in the dtype of the network."""
        times = 20 if self._task.gpu else 10
        dtype = jnp.bfloat16 if self._task.gpu else jnp.float32
        matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
        return 2 * size**3 * times / _seconds(jax.jit(jnp.dot), times, matrix, matrix)

    def copy_rate(self, count: int) -> float:
        """Bytes per second, read and written, of a copy much larger than the caches."""
        times = 20 if self._task.gpu else 5
        source = jnp.ones(count, jnp.float32)
        return 8 * count * times / _seconds(jax.jit(jnp.negative), times, source)


def _seconds(function: Callable[..., jax.Array], times: int, *arguments: jax.Array) -> float:
    function(*arguments).block_until_ready()
    start = time.perf_counter()
    for _ in range(times):
        result = function(*arguments)
    result.block_until_ready()
    return time.perf_counter() - start
