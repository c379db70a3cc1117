"""PyTorch as in teaching notebooks: a Dataset that reads TIFFs with OpenCV, and an eager loop."""

import csv
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from peers import pytorch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from worker import Task


class Patches(Dataset):
    """TIFFs in the layout of Kaggle, augmented and normalised one by one."""

    def __init__(self, folder: Path, count: int) -> None:
        with (folder / "train_labels.csv").open() as file:
            self._rows = [(row["id"], float(row["label"])) for row in csv.DictReader(file)][:count]
        self._folder = folder / "train"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        name, label = self._rows[index]
        image = cv2.cvtColor(cv2.imread(str(self._folder / f"{name}.tif")), cv2.COLOR_BGR2RGB)
        if np.random.rand() < 0.5:
            image = image[::-1]
        if np.random.rand() < 0.5:
            image = image[:, ::-1]
        image = np.ascontiguousarray(np.rot90(image, np.random.randint(4)))
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        return (pixels - 0.5) / 0.25, torch.tensor(label)


class Peer:
    def __init__(self, task: Task) -> None:
        self._task = task
        self._device = torch.device("cuda" if task.gpu else "cpu")
        torch.set_num_threads(task.cores)
        self._network = pytorch.layers(task).to(self._device)
        self._optimizer = torch.optim.Adam(self._network.parameters(), task.learning_rate)
        self._criterion = nn.BCEWithLogitsLoss()

    def hello(self) -> dict[str, Any]:
        versions = {**pytorch.hello()["versions"], "opencv": cv2.__version__}
        return {"versions": versions}

    def device_memory(self) -> int | None:
        return pytorch.device_memory()

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._network.parameters())

    @cached_property
    def _patches(self) -> Patches:
        return Patches(Path(self._task.folder) / "kaggle", self._task.epoch)

    def _loader(self, batch_size: int) -> DataLoader:
        return DataLoader(
            self._patches,
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self._task.cores,
            pin_memory=self._task.gpu,
        )

    def epoch(self, variant: str, batch_size: int, epoch: int) -> None:
        self._network.train()
        total = 0.0
        for images, labels in self._loader(batch_size):
            images, labels = images.to(self._device), labels.to(self._device)
            self._optimizer.zero_grad()
            loss = self._criterion(self._network(images)[:, 0], labels)
            loss.backward()
            self._optimizer.step()
            total += loss.item()

    def input(self, variant: str, batch_size: int, epoch: int) -> None:
        for images, labels in self._loader(batch_size):
            images.to(self._device), labels.to(self._device)
