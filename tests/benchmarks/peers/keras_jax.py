"""Keras 3 on its JAX backend, with `compile`, `fit` and `predict`."""

import functools
import os
from functools import cached_property
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from keras import layers, ops
from worker import Task


class Symmetries(layers.Layer):
    """Applies a random symmetry of the square to each image in training."""

    def __init__(self) -> None:
        super().__init__(dtype="uint8")
        self._seeds = keras.random.SeedGenerator(0)

    def call(self, images: Any, training: bool = False) -> Any:
        if not training:
            return images
        draws = keras.random.uniform((3, ops.shape(images)[0], 1, 1, 1), seed=self._seeds)
        transpose, rows, columns = ops.unstack(draws < 0.5, 3)
        images = ops.where(transpose, ops.transpose(images, (0, 2, 1, 3)), images)
        images = ops.where(rows, ops.flip(images, 1), images)
        return ops.where(columns, ops.flip(images, 2), images)


class RepeatedBatch(keras.utils.PyDataset):
    """Repeats one batch, which is on the device."""

    def __init__(self, images: Any, labels: Any, steps: int) -> None:
        super().__init__()
        self._batch, self._steps = (images, labels), steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Any:
        return self._batch


class Peer:
    def __init__(self, task: Task) -> None:
        self._task = task
        if task.gpu:
            keras.mixed_precision.set_global_policy("mixed_bfloat16")
        blocks = []
        for channels in task.features:
            blocks += [
                layers.Conv2D(channels, 3, padding="same", use_bias=False),
                layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
                layers.ReLU(),
                layers.MaxPooling2D(2),
            ]
        self._model = keras.Sequential(
            [
                layers.Input((96, 96, 3), dtype="uint8"),
                Symmetries(),
                layers.Rescaling(1 / 255 / 0.25, offset=-0.5 / 0.25),
                *blocks,
                layers.Flatten(),
                layers.Dense(task.dense, activation="relu"),
                layers.Dropout(task.dropout),
                layers.Dense(1, dtype="float32"),
            ]
        )
        self._model.compile(
            keras.optimizers.Adam(task.learning_rate),
            keras.losses.BinaryCrossentropy(from_logits=True),
            jit_compile=True,
        )

    def hello(self) -> dict[str, Any]:
        return {"versions": {"keras": keras.__version__}}

    def device_memory(self) -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def parameters(self) -> int:
        return int(sum(np.prod(variable.shape) for variable in self._model.trainable_variables))

    @cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        return self._task.images(), self._task.labels()[:, None]

    @functools.cache  # noqa: B019 (a peer lives as long as its process)
    def _resident(self, batch_size: int) -> list[jax.Array]:
        return [jax.device_put(data[:batch_size]) for data in self._data]

    def train(self, variant: str, batch_size: int, steps: int) -> None:
        self._model.fit(RepeatedBatch(*self._resident(batch_size), steps), shuffle=False, verbose=0)
        self._wait()

    def epoch(self, variant: str, batch_size: int, epoch: int) -> None:
        # Drops the remainder, which would be compiled separately; the other peers drop it, too.
        count = epoch // batch_size * batch_size
        images, labels = (data[:count] for data in self._data)
        self._model.fit(images, labels, batch_size, verbose=0)
        self._wait()

    def predict(self, variant: str, batch_size: int, batches: int) -> None:
        images, _ = self._resident(batch_size)
        self._model.predict(RepeatedBatch(images, None, batches), verbose=0)

    def _wait(self) -> None:
        jax.block_until_ready([variable.value for variable in self._model.variables])
