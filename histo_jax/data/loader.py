"""Order and batches, by Grain.

Positions are shuffled, the numbers of a subset's examples; pixels are gathered a batch at a time.
The batch of a step is a function of seed and step alone, so the state of a run's data is one
integer.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, TypeVar, runtime_checkable

import grain
import numpy as np
from grain.experimental import index_shuffle

# Batches prefetched: enough to hide a slow read, few enough for a small machine (a batch
# of 64 is 1.8 MB). Worker processes instead of threads were slower on two cores, and take 2 s to
# start.
_PREFETCH = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)

# Pixels of the patches that are read at once where their number does not matter: 7 MB.
_READ_PIXELS = 256 * 96 * 96

T = TypeVar("T")


@runtime_checkable
class RandomAccessSource(Protocol):
    """Random access to records, as a data source of TFDS."""

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Reads several records at once."""
        ...


class Records(NamedTuple):
    """The examples of a subset on disk; position i is row `rows[i]`.

    Attributes:
        source: records that contain them.
        rows: int64[n].
        labels: float32[n], 0 or 1.
    """

    source: RandomAccessSource
    rows: np.ndarray
    labels: np.ndarray

    def images(self, positions: np.ndarray) -> np.ndarray:
        """Reads uint8[k, size, size, 3]."""
        records = self.source.__getitems__(self.rows[positions].tolist())
        return np.stack([record["image"] for record in records])


def read_size(image_size: int) -> int:
    """Returns how many patches of a size to read at once, so that memory stays flat."""
    return max(1, _READ_PIXELS // image_size**2)


class Batch(TypedDict):
    """Examples of one step.

    Attributes:
        image: uint8[batch, size, size, 3], in memory or on the devices.
        label: float32[batch], 0 or 1 (-1 where not known).
        mask: bool[batch], False where a row is padding.
    """

    image: Any
    label: np.ndarray
    mask: np.ndarray


def training_order(count: int, batch_size: int, seed: int) -> grain.MapDataset:
    """Returns the endless sequence of batches: element k = int64[batch_size], positions of step k.

    Every pass has a new order and drops the remainder that is smaller than a batch. The order is
    that of
    `range(count).seed(seed).shuffle().batch(batch_size, drop_remainder=True).repeat()`, which
    would take three times as long: 160,000 a second, and a GPU trains as fast.
    """
    first_seed = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])
    batches = count // batch_size

    def batch(step: int) -> np.ndarray:
        number, begin = step // batches, step % batches * batch_size
        pass_seed = (first_seed + number) % 2**32
        shuffled = (
            index_shuffle(i, count - 1, pass_seed, 4) for i in range(begin, begin + batch_size)
        )
        return np.fromiter(shuffled, np.int64, batch_size)

    return grain.MapDataset.range(sys.maxsize).map(batch)


def eval_order(count: int, batch_size: int) -> grain.MapDataset:
    """Returns the positions from 0 up in batches of int64[batch_size].

    The last batch is padded with the last position.
    """
    starts = grain.MapDataset.range(0, count, batch_size)
    return starts.map(lambda start: np.minimum(np.arange(start, start + batch_size), count - 1))


def prefetch(
    order: grain.MapDataset, make: Callable[[np.ndarray], T], first: int = 0
) -> Iterator[T]:
    """Yields `make(element)` for element `first` and all later ones, prefetched in threads."""
    iterator = iter(order.map(make).to_iter_dataset(_PREFETCH))
    iterator.set_state({"next_index": first})
    return iterator


def ordered_batches(
    source: RandomAccessSource, rows: np.ndarray, batch_size: int
) -> Iterator[Batch]:
    """Yields the given rows once, in order; the last batch is padded and masked."""

    def gather(positions: np.ndarray) -> Batch:
        mask = np.diff(positions, prepend=-1) > 0
        examples = source.__getitems__(rows[positions[mask]].tolist())
        examples += examples[-1:] * (batch_size - len(examples))
        return Batch(
            image=np.stack([example["image"] for example in examples]),
            label=np.array([example["label"] for example in examples], np.float32),
            mask=mask,
        )

    return prefetch(eval_order(len(rows), batch_size), gather)
