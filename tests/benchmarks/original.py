"""The recipe of the original teaching project in PyTorch, on the patches of a histo_jax config.

Five blocks of convolution, BatchNorm, ReLU and max-pooling, two dense layers with dropout, random
flips and rotations, Adam at a constant rate, early stopping on the validation loss. PyTorch runs
at its best here: eager, channels last, all patches in memory. Scores are computed as those of
histo_jax: of probabilities that are calibrated on the validation split.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peers import pytorch
from torch import Tensor
from torch.nn import functional
from worker import Task

from histo_jax.config import Config
from histo_jax.data.records import Prepared
from histo_jax.data.splits import Subset, channel_stats, make_subsets
from histo_jax.metrics import Calibration, binary_scores

Epoch = dict[str, Any]


def train(config: Config, prepared: Prepared, cores: int) -> Iterator[Epoch]:
    """Trains until early stopping; yields the scores of each epoch, as `history.csv` has them.

    Minutes are those since the first step began, validation included.

    Args:
        config: of the network `five_block`.
        prepared: the records.
        cores: number of threads.
    """
    subsets = make_subsets(prepared.tables, config.data, config.data_seed)
    images, labels = _load(prepared, subsets.train)
    others, targets = _load(prepared, subsets.validation)
    mean, std = channel_stats(prepared.tables[subsets.train.records], subsets.train.rows)
    task = Task(
        config.model.features,
        config.model.dense,
        config.model.dropout,
        config.optimizer.learning_rate,
        cores,
        False,
        "",
        len(images),
    )
    network = _Network(task, mean, std, config.seed)
    best, best_epoch, began = float("inf"), 0, time.monotonic()
    for epoch in range(1, config.fit.epochs + 1):
        loss = network.train(images, labels, config.fit.batch_size)
        logits = network.logits(others)
        probabilities = Calibration.fit(logits, targets.numpy()).apply(logits)
        scores = binary_scores(probabilities, targets.numpy())
        yield {
            "epoch": epoch,
            "train_loss": loss,
            "validation_loss": scores["nll"],
            "validation_auc": scores["auc"],
            "validation_accuracy": scores["accuracy"],
            "minutes": (time.monotonic() - began) / 60,
        }
        if scores["nll"] < best:
            best, best_epoch = scores["nll"], epoch
        if epoch - best_epoch >= config.early_stopping.patience:
            return


class _Network:
    """The network in training.

    Args:
        task: its sizes, the rate, and the number of threads.
        mean: float32[3], of the channels of the training pixels from 0 to 1.
        std: float32[3], likewise.
        seed: of the weights, the order and the augmentation.
    """

    def __init__(self, task: Task, mean: np.ndarray, std: np.ndarray, seed: int) -> None:
        torch.set_num_threads(task.cores)
        torch.manual_seed(seed)
        self._network = pytorch.layers(task).to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.Adam(self._network.parameters(), task.learning_rate)
        self._mean, self._std = (torch.from_numpy(x).reshape(3, 1, 1) for x in (mean, std))

    def train(self, images: Tensor, labels: Tensor, batch_size: int) -> float:
        """Trains an epoch; returns the mean loss of its steps."""
        self._network.train()
        losses = []
        for rows in torch.randperm(len(images))[: len(images) // batch_size * batch_size].split(
            batch_size
        ):
            batch = pytorch.augment(images[rows].permute(0, 3, 1, 2))
            loss = functional.binary_cross_entropy_with_logits(self._forward(batch), labels[rows])
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return sum(losses) / len(losses)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> np.ndarray:
        """Returns the logits of uint8[n, height, width, 3]."""
        self._network.eval()
        parts = [self._forward(part.permute(0, 3, 1, 2)) for part in images.split(256)]
        return torch.cat(parts).numpy()

    def _forward(self, images: Tensor) -> Tensor:
        normalised = (images.float() / 255 - self._mean) / self._std
        return self._network(normalised.contiguous(memory_format=torch.channels_last))[:, 0]


def _load(prepared: Prepared, subset: Subset) -> tuple[Tensor, Tensor]:
    """Returns all pixels, uint8[n, height, width, 3], and labels, float32[n], of a subset."""
    records = prepared.records(*subset)
    positions = np.arange(len(subset.rows))
    parts = [records.images(part) for part in np.array_split(positions, len(positions) // 256 + 1)]
    return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(records.labels)
