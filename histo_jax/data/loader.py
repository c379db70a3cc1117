"""Order and batches, by Grain.

What is shuffled are row numbers; pixels are gathered a batch at a time. The batch of a step is a
function of seed and step alone, so one integer says where a run stands.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

import grain
import numpy as np

# Batches read ahead: enough to hide one slow read, few enough for a small machine (a batch of 64
# is 1.8 MB).
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@runtime_checkable
class Source(Protocol):
    """Random access to records, as TFDS's data sources give it."""

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Reads several records at once."""
        ...


class Batch(TypedDict):
    """Examples of one step.

    Attributes:
        image: uint8[batch, 96, 96, 3].
        label: float32[batch], 0 or 1 (-1 where not known).
        mask: bool[batch], False where a row only fills up the batch.
    """

    image: np.ndarray
    label: np.ndarray
    mask: np.ndarray


def training_order(rows: np.ndarray, batch_size: int, seed: int) -> grain.MapDataset:
    """Returns the endless sequence of row batches: element k = int64[batch_size] of step k.

    Every pass shuffles anew and leaves out the remainder that fills no batch.
    """
    return (
        grain.MapDataset.source(rows)
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True)
        .repeat()
    )


def training_batches(
    source: Source, rows: np.ndarray, batch_size: int, seed: int, first_step: int
) -> Iterator[Batch]:
    """Yields the batches of `first_step` and all later steps, reading ahead in threads."""

    def gather(chosen: np.ndarray) -> Batch:
        return _gather(source, chosen, len(chosen))

    batches = training_order(rows, batch_size, seed).map(gather).to_iter_dataset(_READ_AHEAD)
    iterator = iter(batches)
    iterator.set_state({"next_index": first_step})
    return iterator


def ordered_batches(source: Source, rows: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Yields the given rows once, in order; the last batch is filled up and masked."""

    def gather(start: int) -> Batch:
        return _gather(source, rows[start : start + batch_size], batch_size)

    starts = grain.MapDataset.range(0, len(rows), batch_size)
    return iter(starts.map(gather).to_iter_dataset(_READ_AHEAD))


def _gather(source: Source, rows: np.ndarray, size: int) -> Batch:
    examples = source.__getitems__(rows.tolist())
    examples += examples[-1:] * (size - len(rows))
    return Batch(
        image=np.stack([example["image"] for example in examples]),
        label=np.array([example["label"] for example in examples], np.float32),
        mask=np.arange(size) < len(rows),
    )
