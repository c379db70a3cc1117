"""Applies a predictor to records: each process reads and computes an equal share of them."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float32, Int

from histo_jax.data import loader
from histo_jax.distributed import processes
from histo_jax.predictor import Predictor
from histo_jax.run import progress, signals


def raw_logits(
    predictor: Predictor,
    source: loader.RandomAccessSource,
    rows: Int[np.ndarray, " n"],
    description: str,
) -> Float32[np.ndarray, "networks n"]:
    """Returns each network's uncalibrated logits of some records, in every process.

    Args:
        predictor: the networks.
        source: the records.
        rows: which of them, at least one.
        description: of the progress bar.

    Raises:
        Preempted: a signal has asked this process to stop.
    """
    share = -(-len(rows) // jax.process_count())
    # The last processes may lack some rows, and repeat the last row instead.
    first = share * jax.process_index()
    own = rows[np.minimum(np.arange(first, first + share), len(rows) - 1)]
    size = min(predictor.batch_size, share)
    # Large batches are read in parts, of which several are in memory at once.
    read = min(size, loader.read_size(predictor.patch.size))
    batches = signals.stopping(loader.ordered_batches(source, own, read))
    with progress.bar(
        description, share, unit=" img", leave=False, is_shown=processes.is_primary()
    ) as bar:
        images = (
            batch["image"][: batch["mask"].sum()]
            for batch in progress.counted(bar, batches, read, share)
        )
        logits = predictor.raw_logits(images, size)
    if jax.process_count() == 1:
        return logits
    shares = multihost_utils.process_allgather(logits)
    return np.concatenate(list(np.asarray(shares)), axis=1)[:, : len(rows)]
