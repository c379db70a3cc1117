"""PyTorch with all patches on the device and a loop without synchronisation."""

from collections.abc import Callable
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from worker import Task


def layers(task: Task) -> nn.Sequential:
    """Returns the network from normalised images to logits [batch, 1]."""
    blocks: list[nn.Module] = []
    for before, after in pairwise((3, *task.features)):
        blocks += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
    size = 96 // 2 ** len(task.features)
    return nn.Sequential(
        *blocks,
        nn.Flatten(),
        nn.Linear(size * size * task.features[-1], task.dense),
        nn.ReLU(inplace=True),
        nn.Dropout(task.dropout),
        nn.Linear(task.dense, 1),
    )


def hello() -> dict[str, Any]:
    """Returns the versions for the report."""
    return {"versions": {"torch": torch.__version__}}


def device_memory() -> int | None:
    """Returns the peak memory of tensors on the GPU, bytes."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def augment(images: Tensor) -> Tensor:
    """Returns each image under a random symmetry of the square."""
    transpose, rows, columns = torch.rand(3, len(images), 1, 1, 1, device=images.device) < 0.5
    images = torch.where(transpose, images.transpose(2, 3), images)
    images = torch.where(rows, images.flip(2), images)
    return torch.where(columns, images.flip(3), images)


class Peer:
    def __init__(self, task: Task) -> None:
        self._device = torch.device("cuda" if task.gpu else "cpu")
        torch.set_num_threads(task.cores)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        self._network = layers(task).to(self._device, memory_format=torch.channels_last)
        self._optimizer = torch.optim.Adam(
            self._network.parameters(), task.learning_rate, fused=True
        )
        self._autocast = partial(
            torch.autocast, self._device.type, torch.bfloat16, enabled=task.gpu
        )
        # On a GPU with CUDA graphs, which save the launch of kernels at small batches.
        compiled = partial(
            torch.compile, dynamic=False, mode="reduce-overhead" if task.gpu else "default"
        )
        self._losses = {"eager": self._loss, "compiled": compiled(self._loss)}
        self._forwards = {"eager": self._forward, "compiled": compiled(self._forward)}
        self._task = task

    def hello(self) -> dict[str, Any]:
        return hello()

    def device_memory(self) -> int | None:
        return device_memory()

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._network.parameters())

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor]:
        """All patches, uint8 and channels last, and labels, on the device."""
        images, labels = torch.from_numpy(self._task.images()), self._task.labels()
        return images.to(self._device), torch.from_numpy(labels).to(self._device)

    def _forward(self, images: Tensor) -> Tensor:
        with self._autocast():
            logits = self._network((images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25)
        return logits[:, 0].float()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        images = augment(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return functional.binary_cross_entropy_with_logits(self._forward(images), labels)

    def _step(self, loss_of: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(images, labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def train(self, variant: str, batch_size: int, steps: int) -> None:
        self._network.train()
        images, labels = (data[:batch_size] for data in self._data)
        for _ in range(steps):
            loss = self._step(self._losses[variant], images, labels)
        assert loss.isfinite()  # waits for the device

    def epoch(self, variant: str, batch_size: int, epoch: int) -> None:
        self._network.train()
        images, labels = self._data
        order = torch.randperm(epoch, device=self._device) % len(images)
        total = torch.zeros((), device=self._device)
        for chosen in order[: epoch // batch_size * batch_size].split(batch_size):
            total += self._step(self._losses[variant], images[chosen], labels[chosen])
        assert total.isfinite()

    def predict(self, variant: str, batch_size: int, batches: int) -> None:
        self._network.eval()
        images = self._data[0][:batch_size]
        with torch.inference_mode():
            # Cloned, because a CUDA graph overwrites its output at each call.
            logits = [self._forwards[variant](images).clone() for _ in range(batches)]
            torch.cat(logits).cpu()
