"""The sheet of training patches that TensorBoard and callbacks show."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from histo_jax.data import loader
from histo_jax.data.loader import Records
from histo_jax.training.augmentation import Augment, mixup

# Patches along each edge of the sheet, and its largest edge in pixels.
_EDGE, _LARGEST = 6, 1024


def draw_patch_sheet(
    records: Records, batch_size: int, augment: Augment, mixup_alpha: float, seed: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns patches of the first batches, augmented as in training, in a square grid.

    Args:
        records: the training split.
        batch_size: of training.
        augment: see `make_augment`.
        mixup_alpha: see `mixup`; 0 = off.
        seed: of the run.
    """
    count = len(records.rows)
    order = loader.training_order(count, batch_size, seed)
    image_size = len(records.images(np.zeros(1, np.int64))[0])
    shown = min(count, min(_EDGE, _LARGEST // image_size) ** 2)
    positions = np.concatenate([order[step] for step in range(-(-shown // batch_size))])[:shown]
    patches = _augmented(records.images(positions), augment, mixup_alpha, seed)
    edge = math.isqrt(len(patches))
    rows = patches[: edge * edge].reshape(edge, edge, *patches.shape[1:])
    return rows.swapaxes(1, 2).reshape(edge * patches.shape[1], edge * patches.shape[2], 3)


def _augmented(
    images: np.ndarray, augment: Augment, mixup_alpha: float, seed: int
) -> UInt8[np.ndarray, "batch height width 3"]:
    # Users may have JAX refuse implicit transfers to the device.
    with jax.transfer_guard_host_to_device("allow"):
        key, mixup_key = jax.random.split(jax.random.key(seed))
        augmented: Any = augment(key, jnp.asarray(images))
        if mixup_alpha:
            augmented, _ = mixup(mixup_key, augmented, jnp.zeros(len(images)), mixup_alpha)
        return np.asarray(augmented).astype(np.uint8)
