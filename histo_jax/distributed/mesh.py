"""Where arrays lie: one mesh over all devices, batches divided, everything else everywhere."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from histo_jax.errors import UserError


def batch_sharding(devices: Sequence[jax.Device] | None = None) -> NamedSharding:
    """Returns the sharding that divides the first axis over the devices, by default over all."""
    mesh = Mesh(np.asarray(devices or jax.devices()), ("batch",))
    return NamedSharding(mesh, PartitionSpec("batch"))


def replicated(batch_sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on each device of the same mesh."""
    return NamedSharding(batch_sharding.mesh, PartitionSpec())


def make_global_array(values: np.ndarray, where: NamedSharding) -> jax.Array:
    """Puts what this process holds of an array onto its devices; nothing goes between processes.

    Args:
        values: of a divided array this process's rows (see `local_slice`), of a replicated one all.
        where: the sharding of the whole.
    """
    length = len(values) * jax.process_count() if where.spec else None
    shape = values.shape if length is None else (length, *values.shape[1:])
    return jax.make_array_from_process_local_data(where, values, shape)


def local_slice(count: int) -> slice:
    """Returns which of a batch's `count` rows this process holds: the mesh is in their order."""
    each = count // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def check_batch_size(batch_size: int) -> None:
    """Refuses a batch that the devices cannot share equally.

    Raises:
        UserError: names the field and the number of devices.
    """
    if batch_size % jax.device_count():
        raise UserError(
            f"config.fit.batch_size = {batch_size} does not divide by the {jax.device_count()} "
            "devices: choose a multiple"
        )


def round_up(batch_size: int) -> int:
    """Returns the next batch size that the devices can share equally."""
    return -(-batch_size // jax.device_count()) * jax.device_count()
