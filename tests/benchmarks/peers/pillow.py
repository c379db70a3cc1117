"""Pillow in a PyTorch `DataLoader`, as torchvision's `ImageFolder` reads class folders."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import pytorch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from worker import Task


class ClassFolders(Dataset):
    """Images as normalised float32[3, height, width], and the number of their folder."""

    def __init__(self, folder: Path) -> None:
        classes = sorted(path.name for path in folder.iterdir())
        self._files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).iterdir())
        ]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self._files[index]
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return (pixels.permute(2, 0, 1).contiguous().float() / 255 - 0.5) / 0.25, label


class Peer:
    def __init__(self, task: Task) -> None:
        self._task = task

    def hello(self) -> dict[str, Any]:
        return pytorch.hello()

    def device_memory(self) -> int | None:
        return pytorch.device_memory()

    @functools.cache  # noqa: B019 (a peer lives as long as its process)
    def _loader(self, folder: str, batch_size: int) -> DataLoader:
        return DataLoader(
            ClassFolders(Path(self._task.folder) / folder / "train"),
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self._task.cores,
            persistent_workers=True,
            pin_memory=self._task.gpu,
        )

    def first_epoch(self, folder: str, batch_size: int) -> None:
        """Starts the workers and reads all files."""
        self._loader.cache_clear()
        self.next_epoch(folder, batch_size)

    def next_epoch(self, folder: str, batch_size: int) -> None:
        """Reads all files again."""
        device = "cuda" if self._task.gpu else "cpu"
        for images, labels in self._loader(folder, batch_size):
            images.to(device), labels.to(device)
