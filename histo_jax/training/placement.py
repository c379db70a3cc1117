"""Placement of the pixels during training, and batches from each placement.

`device`: a full copy in the memory of every device, so that each gathers its own rows of a batch
without communication. `host`: in host memory; batches are gathered and copied to the devices ahead
of time. `disk`: in the records; batches are read and copied ahead of time. The batches are equal.
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
from histo_jax.data.loader import Batch, Records
from histo_jax.distributed import consensus, memory
from histo_jax.distributed.mesh import local_slice, make_global_array, replicated
from histo_jax.errors import ConfigError
from histo_jax.run import progress, signals

log = logging.getLogger("histo_jax")

# `auto` uses this fraction of the free memory; the rest is for the network, its activations and
# prefetched batches. An explicit placement may use all of it.
_AUTO_FRACTION = 0.75

Images = UInt8[Array, "batch size size 3"]
Pixels = UInt8[Array, "examples pixels"]


class TrainingBatch(TypedDict):
    """The input of a training step, sharded over the devices.

    Attributes:
        image: uint8[batch, size, size, 3].
        label: float32[batch], 0 or 1.
        control: int32[devices], control signals of the processes, see `step.Control`; optional.
    """

    image: jax.Array
    label: jax.Array
    control: NotRequired[jax.Array]


class Dataset:
    """The examples of one split in any placement.

    A batch is made in two stages: `load` runs in threads ahead of time, `finish` when the batch is
    due.

    Args:
        labels: float32[n].
        batch_sharding: shards a batch over the devices.
        load: returns what is copied to the devices, from the positions of this process's examples
            of a batch, int64[k].
        finish: returns uint8[batch, size, size, 3] from that, on the devices.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_sharding: NamedSharding,
        load: Callable[[np.ndarray], np.ndarray],
        finish: Callable[[jax.Array], jax.Array] = lambda images: images,
    ) -> None:
        self._labels, self._batch_sharding = labels, batch_sharding
        self._load, self._finish = load, finish

    def __len__(self) -> int:
        return len(self._labels)

    def training_batches(
        self, batch_size: int, seed: int, first_step: int
    ) -> Iterator[TrainingBatch]:
        """Yields the batches of `first_step` and all later steps, a function of seed and step."""
        order = loader.training_order(len(self), batch_size, seed)
        for loaded, label in loader.prefetch(order, self._to_devices, first_step):
            yield TrainingBatch(image=self._finish(loaded), label=label)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields all examples once, in order; only the images are on the devices."""
        count = len(self)
        order = loader.eval_order(count, batch_size)
        starts = range(0, count, batch_size)
        for start, (loaded, _) in zip(
            starts, loader.prefetch(order, self._to_devices), strict=True
        ):
            positions = np.arange(start, start + batch_size)
            yield Batch(
                image=self._finish(loaded),
                label=self._labels[np.minimum(positions, count - 1)],
                mask=positions < count,
            )

    def _to_devices(self, positions: np.ndarray) -> tuple[jax.Array, jax.Array]:
        local = positions[local_slice(len(positions))]
        # In a thread of Grain, which has the configuration of the user, not of the command.
        with jax.transfer_guard("allow"):
            return (
                make_global_array(self._load(local), self._batch_sharding),
                make_global_array(self._labels[local], self._batch_sharding),
            )


def place(
    setting: str, subsets: Sequence[Records], image_size: int, batch_sharding: NamedSharding
) -> list[Dataset]:
    """Loads the pixels of all subsets as `data.placement` says, and logs where they are and why.

    Loading shows a progress bar, and stops at a signal.

    Args:
        setting: 'auto', 'device', 'host' or 'disk'.
        subsets: their records.
        image_size: height and width of all images in pixels.
        batch_sharding: shards a batch over the devices.

    Raises:
        ConfigError: there is too little memory for an explicit placement; names field and sizes.
        Preempted: a signal came.
    """
    count = sum(len(subset.rows) for subset in subsets)
    placement = _select(setting, count * 3 * image_size**2, batch_sharding.mesh.local_devices)
    if placement == "disk":
        return [on_disk(subset, batch_sharding) for subset in subsets]
    load = _on_devices if placement == "device" else _in_memory
    with progress.bar("loading", count, unit=" img") as bar:
        return [load(subset, image_size, batch_sharding, bar) for subset in subsets]


def on_disk(subset: Records, batch_sharding: NamedSharding) -> Dataset:
    """Returns the examples of a subset, read from disk batch by batch."""
    return Dataset(subset.labels, batch_sharding, subset.images)


def _select(setting: str, needed: int, devices: Sequence[jax.Device]) -> str:
    """Returns the placement of `needed` bytes, equal in all processes, and logs it."""
    places = {
        "device": f"on each of {len(devices)} devices" if len(devices) > 1 else "on the device",
        "host": "in memory",
    }
    # The minimum over all machines: all must select the same.
    free = {
        "device": consensus.global_minimum(memory.free_on_devices(devices)),
        "host": consensus.global_minimum(memory.free_on_host()),
    }
    sizes = {name: "unknown" if size is None else _gb(size) for name, size in free.items()}
    if setting == "auto":
        if devices[0].platform == "cpu":
            del free["device"]  # in the same memory, but a copy for each device, and slower
        fitting = (n for n, size in free.items() if size and needed <= _AUTO_FRACTION * size)
        selected = next(fitting, "disk")
        skipped = list(free)[: [*free, "disk"].index(selected)]
        reason = " and ".join(f"{places[name]} ({sizes[name]} free)" for name in skipped)
        reason = reason and f"; more than {_AUTO_FRACTION:.0%} of the free memory {reason}"
    else:
        selected, reason = setting, " as set"
        size = free.get(setting)
        if size is not None and needed > size:
            raise ConfigError(
                f"config.data.placement = {setting!r} needs {_gb(needed)} {places[setting]}, but "
                f"{sizes[setting]} are free: set 'auto' or 'disk', or use fewer patches by "
                "--config.data.samples_per_class"
            )
    if selected == "disk":
        log.info("data.placement: disk%s; %s are read per epoch", reason, _gb(needed))
    else:
        log.info(
            "data.placement: %s%s; pixels need %s %s, %s free",
            selected,
            reason,
            _gb(needed),
            places[selected],
            sizes[selected],
        )
    return selected


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _read(subset: Records, image_size: int, bar: progress.Bar) -> Iterator[tuple[int, np.ndarray]]:
    """Yields all images of a subset, as `(first position, uint8[k, size, size, 3])`."""
    batches = loader.ordered_batches(subset.source, subset.rows, loader.read_size(image_size))
    start = 0
    for batch in signals.stopping(batches):
        images = batch["image"][: batch["mask"].sum()]
        yield start, images
        start += len(images)
        bar.update(len(images))


def _in_memory(
    subset: Records, image_size: int, batch_sharding: NamedSharding, bar: progress.Bar
) -> Dataset:
    pixels = np.empty((len(subset.rows), image_size, image_size, 3), np.uint8)
    for start, images in _read(subset, image_size, bar):
        pixels[start : start + len(images)] = images
    return Dataset(subset.labels, batch_sharding, lambda positions: pixels.take(positions, axis=0))


def _on_devices(
    subset: Records, image_size: int, batch_sharding: NamedSharding, bar: progress.Bar
) -> Dataset:
    sharding, gather = replicated(batch_sharding), make_gather(image_size, batch_sharding)
    # Flat, because a TPU would pad a last axis of 3 to 128. Written part by part into one buffer:
    # there is never a second copy.
    shape = (len(subset.rows), 3 * image_size**2)
    pixels = jax.jit(lambda: jnp.zeros(shape, jnp.uint8), out_shardings=sharding)()
    write = jax.jit(_write, donate_argnums=0, out_shardings=sharding)
    for start, images in _read(subset, image_size, bar):
        part = images.reshape(len(images), -1)
        pixels = write(
            pixels,
            make_global_array(part, sharding),
            make_global_array(np.array(start, np.int32), sharding),
        )
    return Dataset(
        subset.labels,
        batch_sharding,
        lambda positions: positions.astype(np.int32),
        lambda positions: gather(pixels, positions),
    )


def _write(pixels: Pixels, part: UInt8[Array, "part pixels"], start: Int32[Array, ""]) -> Pixels:
    return jax.lax.dynamic_update_slice(pixels, part, (start, 0))


def make_gather(
    image_size: int, batch_sharding: NamedSharding
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the compiled `(pixels, positions) -> uint8[batch, size, size, 3]`.

    The pixels, uint8[n, size * size * 3], are replicated; the positions, int32[batch] below n, and
    the images are sharded. Each device gathers its own images, without communication.
    """

    def gather(pixels: Pixels, positions: Int32[Array, " batch"]) -> Images:
        rows = pixels.at[positions].get(mode="promise_in_bounds")
        return rows.reshape(-1, image_size, image_size, 3)

    spec = batch_sharding.spec
    per_device = jax.shard_map(
        gather, mesh=batch_sharding.mesh, in_specs=(PartitionSpec(), spec), out_specs=spec
    )
    return jax.jit(per_device, out_shardings=batch_sharding)
