"""Windows that overlap, cut on the device from blocks of pixels that are copied there once."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from histo_jax.models.forward import Weights

# Blocks that the windows of one batch may be in.
SLOTS = 4


def on_windows(function: Callable[[Weights, Any], Any], size: int) -> Callable[..., Any]:
    """Returns the function of weights, blocks, and int32[n, 3], block, y and x of each window."""

    def of_windows(weights: Weights, blocks: tuple[Any, ...], corners: Any) -> Any:
        pixels = jnp.stack(blocks)

        def cut(corner: Any) -> Any:
            start = (*corner, 0)
            return jax.lax.dynamic_slice(pixels, start, (1, size, size, 3))[0]

        return function(weights, jax.vmap(cut)(corners))

    return of_windows


def batches(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], size: int
) -> Iterator[tuple[tuple[jax.Array, ...], np.ndarray, int]]:
    """Yields blocks on the first device, `size` corners of windows, and how many are no padding.

    Blocks with few windows share a batch.
    """
    slots: list[jax.Array] = []
    corners, count = np.zeros((size, 3), np.int32), 0

    def batch() -> tuple[tuple[jax.Array, ...], np.ndarray, int]:
        return tuple(slots + slots[-1:] * (SLOTS - len(slots))), corners, count

    for pixels, own in blocks:
        slots.append(jax.device_put(pixels, jax.local_devices()[0]))
        start = 0
        while start < len(own):
            taken = own[start : start + size - count]
            corners[count : count + len(taken)] = np.insert(taken, 0, len(slots) - 1, axis=1)
            start, count = start + len(taken), count + len(taken)
            if count == size:
                yield batch()
                slots = slots[-1:] if start < len(own) else []
                corners, count = np.zeros((size, 3), np.int32), 0
        if len(slots) == SLOTS:
            yield batch()
            slots, corners, count = [], np.zeros((size, 3), np.int32), 0
    if count:
        yield batch()
