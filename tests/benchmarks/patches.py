"""Patches in the file layouts that histo_jax reads."""

import csv
import hashlib
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from histo_jax.data.sources.synthetic import generate_tile

_PER_TILE = 64  # images cut from one synthetic tile


def write_kaggle(folder: Path, count: int) -> None:
    """Writes patches of noise as TIFFs in the layout of Kaggle, and the same patches as arrays."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count + 1, 96, 96, 3), np.uint8)
    labels = np.arange(count) % 2
    np.save(folder / "images.npy", images[:count])
    np.save(folder / "labels.npy", labels.astype(np.float32))
    names = [hashlib.sha1(image).hexdigest() for image in images]
    for split, file, rows in (
        ("train", "train_labels.csv", slice(count)),
        ("test", "sample_submission.csv", slice(count, None)),
    ):
        (folder / "kaggle" / split).mkdir(parents=True)
        for name, image in zip(names[rows], images[rows], strict=True):
            Image.fromarray(image).save(folder / "kaggle" / split / f"{name}.tif")
        with (folder / "kaggle" / file).open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["id", "label"])
            writer.writerows(zip(names[rows], [*labels, 0][rows], strict=True))


def write_pcam(folder: Path, count: int) -> None:
    """Writes patches of noise in the layout of PatchCamelyon, in chunks."""
    rng = np.random.default_rng(0)
    for split, size in (("train", count), ("valid", 64)):
        name = f"camelyonpatch_level_2_split_{split}"
        with h5py.File(folder / f"{name}_y.h5", "w") as file:
            file["y"] = (np.arange(size) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)
        with h5py.File(folder / f"{name}_x.h5", "w") as file:
            images = file.create_dataset("x", (size, 96, 96, 3), np.uint8, chunks=(16, 96, 96, 3))
            for start in range(0, size, 512):
                part = min(512, size - start)
                images[start : start + part] = rng.integers(0, 256, (part, 96, 96, 3), np.uint8)


def write_images(folder: Path, suffix: str, size: int, count: int) -> None:
    """Writes synthetic tissue as image files in class folders; noise would decode too slowly.

    Args:
        folder: to be created.
        suffix: of the files, `.png` or `.jpg`.
        size: their height and width in pixels.
        count: of the training split; the validation split has two.
    """
    for split, number in (("train", count), ("validation", 2)):
        for k in range(number):
            if k % _PER_TILE == 0:
                rng = np.random.default_rng([split == "train", k])
                tile, _ = generate_tile(rng)
                places = len(tile) - size + 1
                # Each place once: images with the same pixels and different labels are refused.
                corners = rng.choice(places**2, _PER_TILE, replace=False)
            y, x = divmod(corners[k % _PER_TILE], places)
            path = folder / split / str(k % 2) / f"{k}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(tile[y : y + size, x : x + size]).save(path)
