"""Reads files by threads ahead of their use."""

import collections
import concurrent.futures
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from histo_jax.data import raw_files
from histo_jax.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
# Files of one task of a thread: a task costs as much as reading a small file.
_GROUP = 16
# Groups in memory at once, but for those that threads are reading.
_READY = 8


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], size: int = _GROUP
) -> Iterator[Result]:
    """Yields `read(item)` for each file, or each part of one, in order.

    Args:
        read: mostly decodes and hashes, for which it releases the interpreter's lock.
        items: the files.
        size: items of one task of a thread. About ten tasks are in memory at once.
    """

    def read_group(group: list[Item]) -> list[Result]:
        return [read(item) for item in group]

    threads = os.cpu_count() or 1
    groups = _groups(iter(items), size)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        # Pillow warns about a truncated header before it raises.
        warnings.filterwarnings("ignore", module="PIL")
        tasks: collections.deque[concurrent.futures.Future[list[Result]]] = collections.deque()
        try:
            for group in itertools.islice(groups, threads + _READY):
                tasks.append(pool.submit(read_group, group))
            while tasks:
                results = tasks.popleft().result()
                for group in itertools.islice(groups, 1):
                    tasks.append(pool.submit(read_group, group))
                yield from results
        finally:
            pool.shutdown(cancel_futures=True)


def _groups(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while group := list(itertools.islice(items, size)):
        yield group


def unreadable_files(path: Path, error: Exception, results: Iterator[object]) -> DataError:
    """Returns the error for a file that the system could not read, and for those after it.

    Args:
        path: this file.
        error: why it could not be read.
        results: of `read_ahead` for those that follow; 511 more are read.
    """
    following = list(itertools.islice(results, 511))
    failed = sum(isinstance(result, Exception) for result in following)
    also = f", nor can {failed} more of {len(following) + 1}" if failed else ""
    return raw_files.unreadable(path, error, also=also)
