"""Where the pixels lie while a network trains, and the batches made from there.

`device`: in the memory of every device, a whole copy each, so that each gathers its own rows of a
batch and none waits for another. `host`: in memory; batches are gathered and sent ahead of need.
`disk`: in the records; batches are read and sent ahead of need. The batches are the same.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, UInt8

from histo_jax.data import loader
from histo_jax.data.example import IMAGE_SHAPE
from histo_jax.data.loader import Batch, Records
from histo_jax.distributed import consensus, memory
from histo_jax.distributed.mesh import local_slice, make_global_array, replicated
from histo_jax.errors import UserError
from histo_jax.run import progress, signals

log = logging.getLogger("histo_jax")

_IMAGE_BYTES = int(np.prod(IMAGE_SHAPE))
# What `auto` fills of the free memory; the rest is for the network, its activations and the
# batches under way. An explicit placement may take all of it.
_SHARE = 0.75
_READ_AT_ONCE = 256  # patches: 7 MB

Images = UInt8[Array, "batch 96 96 3"]
Pixels = UInt8[Array, "examples pixels"]


class TrainingBatch(TypedDict):
    """What a training step takes, divided over the devices.

    Attributes:
        image: uint8[batch, 96, 96, 3].
        label: float32[batch], 0 or 1.
        request: int32[devices], what the processes ask for; may be missing.
    """

    image: jax.Array
    label: jax.Array
    request: NotRequired[jax.Array]


class Dataset:
    """The examples of one side, wherever their pixels lie."""

    def __init__(
        self,
        labels: np.ndarray,
        batch_sharding: NamedSharding,
        prepare: Callable[[np.ndarray], np.ndarray],
        finish: Callable[[jax.Array], jax.Array] = lambda images: images,
    ) -> None:
        """Batches are made in two parts.

        Args:
            labels: float32[n] of the side.
            batch_sharding: divides a batch over the devices.
            prepare: from int64[k] positions, those of a batch that are this process's, what is
                sent to the devices; ahead, in threads.
            finish: from that, on the devices, uint8[batch, 96, 96, 3]; when the batch is due.
        """
        self._labels, self._batched = labels, batch_sharding
        self._prepare, self._finish = prepare, finish

    def training(self, batch_size: int, seed: int, first_step: int) -> Iterator[TrainingBatch]:
        """Yields the batches of `first_step` and all later steps, a function of seed and step."""
        order = loader.training_order(len(self._labels), batch_size, seed)
        for sent, label in loader.prefetch(order, self._send, first_step):
            yield TrainingBatch(image=self._finish(sent), label=label)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields every example once, in order; the images lie on the devices, the rest does not."""
        count = len(self._labels)
        order = loader.eval_order(count, batch_size)
        starts = range(0, count, batch_size)
        for start, (sent, _) in zip(starts, loader.prefetch(order, self._send), strict=True):
            positions = np.arange(start, start + batch_size)
            yield Batch(
                image=self._finish(sent),
                label=self._labels[np.minimum(positions, count - 1)],
                mask=positions < count,
            )

    def _send(self, positions: np.ndarray) -> tuple[jax.Array, jax.Array]:
        own = positions[local_slice(len(positions))]
        # In a thread of Grain's, where the user's setting holds, not that of `runtime.session`.
        with jax.transfer_guard("allow"):
            return (
                make_global_array(self._prepare(own), self._batched),
                make_global_array(self._labels[own], self._batched),
            )


def place(wanted: str, subsets: Sequence[Records], batch_sharding: NamedSharding) -> list[Dataset]:
    """Puts the pixels of all sides where `data.placement` wants them, and logs where and why.

    Loading them shows a progress bar, and stops where a signal asks for it.

    Args:
        wanted: 'auto', 'device', 'host' or 'disk'.
        subsets: their records.
        batch_sharding: divides a batch over the devices.

    Raises:
        UserError: an explicit placement has too little memory; names the field and the sizes.
    """
    count = sum(len(subset.rows) for subset in subsets)
    placement = _choose(wanted, count * _IMAGE_BYTES, batch_sharding.mesh.local_devices)
    if placement == "disk":
        return [on_disk(subset, batch_sharding) for subset in subsets]
    load = _on_devices if placement == "device" else _in_memory
    with progress.bar("loading", count, unit=" img") as bar:
        return [load(subset, batch_sharding, bar) for subset in subsets]


def on_disk(subset: Records, batch_sharding: NamedSharding) -> Dataset:
    """Returns the examples of a side, each read when it is due."""
    return Dataset(subset.labels, batch_sharding, subset.images)


def _choose(wanted: str, needed: int, devices: Sequence[jax.Device]) -> str:
    where = {
        "device": f"on each of {len(devices)} devices" if len(devices) > 1 else "on the device",
        "host": "in memory",
    }
    # Of the machine that has least: all are to choose alike.
    free = {
        "device": consensus.global_minimum(memory.free_on_devices(devices)),
        "host": consensus.global_minimum(memory.free_on_host()),
    }
    said = {name: "unknown" if size is None else _gb(size) for name, size in free.items()}
    if wanted == "auto":
        fits = (name for name, size in free.items() if size and needed <= _SHARE * size)
        chosen = next(fits, "disk")
        passed = list(free)[: [*free, "disk"].index(chosen)]
        reason = " and ".join(f"{where[name]} ({said[name]} free)" for name in passed)
        reason = reason and f"; more than {_SHARE:.0%} of what is free {reason}"
    else:
        chosen, reason = wanted, " as set"
        size = free.get(wanted)
        if size is not None and needed > size:
            raise UserError(
                f"config.data.placement = {wanted!r} needs {_gb(needed)} {where[wanted]}, where "
                f"{said[wanted]} are free: set 'auto' or 'disk', or take fewer patches by "
                "--config.data.samples_per_class"
            )
    if chosen == "disk":
        log.info("data.placement: disk%s; %s are read in every pass", reason, _gb(needed))
    else:
        log.info(
            "data.placement: %s%s; pixels take %s %s, %s free",
            chosen, reason, _gb(needed), where[chosen], said[chosen],
        )  # fmt: skip
    return chosen


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _parts(subset: Records, bar: progress.Bar) -> Iterator[tuple[int, np.ndarray]]:
    """Reads all pixels of a side, as `(first position, uint8[k, 96, 96, 3])`."""
    batches = loader.ordered_batches(subset.source, subset.rows, _READ_AT_ONCE)
    start = 0
    for batch in signals.stopping(batches):
        images = batch["image"][: batch["mask"].sum()]
        yield start, images
        start += len(images)
        bar.update(len(images))


def _in_memory(subset: Records, batch_sharding: NamedSharding, bar: progress.Bar) -> Dataset:
    pixels = np.empty((len(subset.rows), *IMAGE_SHAPE), np.uint8)
    for start, images in _parts(subset, bar):
        pixels[start : start + len(images)] = images
    return Dataset(subset.labels, batch_sharding, lambda positions: pixels.take(positions, axis=0))


def _on_devices(subset: Records, batch_sharding: NamedSharding, bar: progress.Bar) -> Dataset:
    everywhere, gather = replicated(batch_sharding), make_gather(batch_sharding)
    # Flat, because a TPU would fill up a last axis of 3 to 128. Written part by part into one
    # buffer, so that there is never a second copy beside it.
    shape = (len(subset.rows), _IMAGE_BYTES)
    pixels = jax.jit(lambda: jnp.zeros(shape, jnp.uint8), out_shardings=everywhere)()
    write = jax.jit(_write, donate_argnums=0, out_shardings=everywhere)
    for start, images in _parts(subset, bar):
        part = images.reshape(len(images), -1)
        pixels = write(
            pixels,
            make_global_array(part, everywhere),
            make_global_array(np.array(start, np.int32), everywhere),
        )
    return Dataset(
        subset.labels,
        batch_sharding,
        lambda positions: positions.astype(np.int32),
        lambda positions: gather(pixels, positions),
    )


def _write(pixels: Pixels, part: UInt8[Array, "part pixels"], start: Int32[Array, ""]) -> Pixels:
    return jax.lax.dynamic_update_slice(pixels, part, (start, 0))


def make_gather(batch_sharding: NamedSharding) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the compiled `(pixels, positions) -> uint8[batch, 96, 96, 3]`.

    The pixels, uint8[n, 27648], lie whole on each device, the positions, int32[batch] below n, and
    the images are divided over them. Each device gathers its own; nothing goes between devices.
    """

    def gather(pixels: Pixels, positions: Int32[Array, " batch"]) -> Images:
        rows = pixels.at[positions].get(mode="promise_in_bounds")
        return rows.reshape(-1, *IMAGE_SHAPE)

    divided = batch_sharding.spec
    by_device = jax.shard_map(
        gather, mesh=batch_sharding.mesh, in_specs=(PartitionSpec(), divided), out_specs=divided
    )
    return jax.jit(by_device, out_shardings=batch_sharding)
