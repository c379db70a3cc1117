"""What all routes share: the networks, their thread, limits and counters."""

import asyncio
import concurrent.futures
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, UInt8

from histo_jax.predictor import Predictor
from histo_jax.report.attribution import attribute
from histo_jax.serve.batching import PredictionThread, finished
from histo_jax.serve.limits import Limits, Refused
from histo_jax.serve.metrics import Metrics
from histo_jax.serve.model_info import ModelInfo
from histo_jax.serve.receiving import Receiver
from histo_jax.serve.slide_folder import SlideFolder
from histo_jax.slides.grid import Grid

log = logging.getLogger("histo_jax")

Result = TypeVar("Result")

_THREADS = min(4, os.cpu_count() or 1)


class Service:
    """The networks as routes use them.

    Args:
        predictor: the networks.
        info: what clients may know of them.
        slides: that clients may name.
        limits: of requests.

    Attributes:
        is_ready: whether all programs are compiled.
        failure: why they cannot be.
        maps: heat maps that wait or are computed.
        map_lock: held by the one that is computed.
    """

    def __init__(
        self,
        predictor: Predictor,
        info: ModelInfo,
        slides: SlideFolder,
        limits: Limits,
    ) -> None:
        self.predictor, self.info, self.slides, self.limits = predictor, info, slides, limits
        self.receiver = Receiver(limits)
        self.metrics = Metrics(predictor.batch_size, lambda: self.thread.waiting)
        self.thread = PredictionThread(predictor, limits.patches, self.metrics.count_batch)
        self.is_ready, self.maps = False, 0
        self.map_lock = asyncio.Lock()
        self.failure: BaseException | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "decoding")

    async def warm_up(self) -> None:
        """Starts the thread and compiles all programs."""
        self.thread.start()
        try:
            await finished(self.thread.submit(self._compile))
            self.is_ready = True
        except Exception as error:
            self.failure = error

    def close(self) -> None:
        """Ends all threads once their work is done."""
        self.thread.close()
        self._pool.shutdown()

    def check_ready(self) -> None:
        """Refuses requests that need the networks until these are ready.

        Raises:
            Refused: they are not.
        """
        if not self.is_ready:
            raise Refused(
                503, "the server is starting: repeat the request in a few seconds", retry_after=5
            )

    async def decode(
        self,
        function: Callable[..., Result],
        *arguments: Any,
        cancel: Callable[[], object] = lambda: None,
    ) -> Result:
        """Calls a function that needs no networks in a thread; for `cancel` see `finished`."""
        return await finished(self._pool.submit(function, *arguments), cancel)

    async def attribution(
        self, image: UInt8[np.ndarray, "height width 3"]
    ) -> Float[np.ndarray, "height width"]:
        """Returns what each pixel adds to the logit, see `attribution.attribute`."""
        return await finished(self.thread.submit(self._attribute, image))

    def _attribute(self, image: np.ndarray) -> np.ndarray:
        return attribute(self.predictor, image[None], batch_size=1)[0]

    def _compile(self) -> None:
        """Computes one batch of each kind."""
        log.info("compiling the networks")
        size, patch = self.predictor.patch.size, self.predictor.patch
        blank = np.zeros((size, size, 3), np.uint8)
        self.predictor.logits(blank[None])
        self._attribute(blank)
        grid = Grid(size, patch.cell, patch.cell, (1.0, 1.0), (size, size))
        block = np.zeros((grid.block_pixels, grid.block_pixels, 3), np.uint8)
        for _ in self.predictor.window_logits([(block, np.zeros((1, 2), np.int64))]):
            pass
