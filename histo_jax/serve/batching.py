"""One thread that uses the networks: it joins the patches of all clients into batches."""

import asyncio
import collections
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, UInt8

from histo_jax.predictor import Predictor
from histo_jax.serve.limits import Refused

Result = TypeVar("Result")

# Seconds for which a batch waits for patches of other clients.
WAIT = 0.01


class _Patches:
    """The patches of one request; its future gets their logits."""

    def __init__(self, images: np.ndarray) -> None:
        self.images, self.logits = images, np.empty(len(images))
        self.taken = self.done = 0
        self.arrived = time.monotonic()
        self.future: concurrent.futures.Future[np.ndarray] = concurrent.futures.Future()


class PredictionThread:
    """Computes batches of one size, and longer work between them.

    Args:
        predictor: its `batch_size` is that of all batches.
        capacity: patches that may wait.
        on_batch: called in the thread with the number of patches of each batch.
    """

    def __init__(
        self, predictor: Predictor, capacity: int, on_batch: Callable[[int], object]
    ) -> None:
        self._predictor, self._capacity, self._on_batch = predictor, capacity, on_batch
        self._changed = threading.Condition()
        self._requests: collections.deque[_Patches] = collections.deque()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._waiting = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="prediction", daemon=True)

    @property
    def waiting(self) -> int:
        """Patches that wait."""
        return self._waiting

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread once all work is done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    async def logits(
        self, images: UInt8[np.ndarray, "n height width 3"]
    ) -> Float[np.ndarray, " n"]:
        """Returns the calibrated logits of patches; those of a cancelled caller are dropped.

        Raises:
            Refused: too many patches wait.
        """
        if not len(images):
            return np.empty(0)
        patches = _Patches(images)
        with self._changed:
            if self._waiting + len(images) > self._capacity:
                raise Refused(
                    429,
                    f"{self._waiting:,} patches wait and {self._capacity:,} may: repeat the "
                    "request later, or send fewer patches",
                    retry_after=5,
                )
            self._requests.append(patches)
            self._waiting += len(images)
            self._changed.notify()
        return await asyncio.wrap_future(patches.future)

    def submit(
        self, function: Callable[..., Result], *arguments: Any
    ) -> "concurrent.futures.Future[Result]":
        """Calls a function in the thread, between two batches; returns the future of its result.

        A long function calls `serve_waiting` now and then.
        """
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            self._calls.append(call)
            self._changed.notify()
        return future

    def serve_waiting(self) -> None:
        """Computes a batch of the patches that wait; for functions that run in the thread."""
        if batch := self._take():
            self._compute(batch)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: bool(self._requests or self._calls or self._is_closed)
                )
                if not self._requests and not self._calls:
                    return
                self._wait_for_others()
                call = self._calls.popleft() if self._calls else None
            self.serve_waiting()
            if call:
                call()

    def _wait_for_others(self) -> None:
        """Waits until a batch is full, or its first patches have waited long enough."""
        if self._requests:
            left = self._requests[0].arrived + WAIT - time.monotonic()
            size = self._predictor.batch_size
            self._changed.wait_for(lambda: self._waiting >= size or self._is_closed, max(0, left))

    def _take(self) -> list[tuple[_Patches, slice]]:
        """Returns the patches of the next batch: parts of requests, the oldest first."""
        batch: list[tuple[_Patches, slice]] = []
        with self._changed:
            free = self._predictor.batch_size
            while self._requests and free:
                patches = self._requests[0]
                end = min(len(patches.images), patches.taken + free)
                if patches.future.cancelled():
                    end = len(patches.images)
                else:
                    batch.append((patches, slice(patches.taken, end)))
                    free -= end - patches.taken
                self._waiting -= end - patches.taken
                patches.taken = end
                if end == len(patches.images):
                    self._requests.popleft()
        return batch

    def _compute(self, batch: list[tuple[_Patches, slice]]) -> None:
        # The client of a future may leave at any time: its result is then dropped.
        try:
            images = np.concatenate([patches.images[part] for patches, part in batch])
            logits = self._predictor.logits(images)
        except Exception as error:
            for patches, _ in batch:
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    patches.future.set_exception(error)
            return
        self._on_batch(len(images))
        start = 0
        for patches, part in batch:
            count = part.stop - part.start
            patches.logits[part] = logits[start : start + count]
            start, patches.done = start + count, patches.done + count
            if patches.done == len(patches.images):
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    patches.future.set_result(patches.logits)


async def finished(
    future: "concurrent.futures.Future[Result]", cancel: Callable[[], object] = lambda: None
) -> Result:
    """Returns the result of a thread; at cancellation, waits for the end of its work.

    What the thread uses may then be closed.

    Args:
        future: of the thread's function.
        cancel: called at cancellation, so that a function that has started ends soon.
    """
    waiter = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(waiter)
    except asyncio.CancelledError:
        if not future.cancel():
            cancel()
            await asyncio.wait({waiter})
            if not waiter.cancelled():
                waiter.exception()  # asyncio would log one that nobody has read
        raise


async def within(seconds: float, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of work, which is cancelled after a time.

    Raises:
        Refused: it took longer.
    """
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise Refused(
            503,
            f"the answer took more than {seconds:g} s: send less at once, or repeat the request "
            "later",
            retry_after=30,
        ) from None
