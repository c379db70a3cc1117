"""One mesh over all devices: batches are sharded over it, everything else is replicated."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from histo_jax.errors import ConfigError


def batch_sharding(devices: Sequence[jax.Device] | None = None) -> NamedSharding:
    """Returns the sharding of the first axis over the devices; None = all devices."""
    mesh = Mesh(np.asarray(devices or jax.devices()), ("batch",))
    return NamedSharding(mesh, PartitionSpec("batch"))


def replicated(batch_sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding with a full copy on each device of the same mesh."""
    return NamedSharding(batch_sharding.mesh, PartitionSpec())


def make_global_array(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Copies the local part of a global array to the local devices, without communication.

    Args:
        values: the rows of this process (see `local_slice`) if the sharding divides the array; the
            whole array if it replicates it.
        sharding: of the global array.
    """
    length = len(values) * jax.process_count() if sharding.spec else None
    shape = values.shape if length is None else (length, *values.shape[1:])
    return jax.make_array_from_process_local_data(sharding, values, shape)


def local_slice(count: int) -> slice:
    """Returns the rows of a global batch of `count` that belong to this process."""
    size = count // jax.process_count()
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def check_batch_size(batch_size: int) -> None:
    """Refuses a batch that cannot be divided equally over the devices.

    Raises:
        ConfigError: names the field and the number of devices.
    """
    if batch_size % jax.device_count():
        raise ConfigError(
            f"config.fit.batch_size = {batch_size} is not a multiple of the "
            f"{jax.device_count()} devices: choose a multiple"
        )
