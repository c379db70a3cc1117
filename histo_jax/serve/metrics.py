"""What `/metrics` counts, for Prometheus."""

from collections.abc import Callable

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """Counters of one server.

    Args:
        batch_size: of the networks.
        waiting: returns the number of patches that wait.
    """

    def __init__(self, batch_size: int, waiting: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "histo_jax_requests", "Requests by route and status", ["route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "histo_jax_request_seconds", "Time to answer a request", ["route"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._batches = Histogram(
            "histo_jax_batch_patches", "Patches in a batch, without padding",
            buckets=sorted({1, batch_size // 4, batch_size // 2, batch_size} - {0}),
            registry=self._registry,
        )  # fmt: skip
        self._cells = Counter(
            "histo_jax_cells", "Cells of heat maps", registry=self._registry
        )  # fmt: skip
        gauge = Gauge("histo_jax_waiting_patches", "Patches that wait", registry=self._registry)
        gauge.set_function(waiting)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Counts an answered request.

        Args:
            route: its path as the server defines it, never as a client writes it.
            status: of HTTP.
            seconds: since it arrived.
        """
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_batch(self, patches: int) -> None:
        """Counts a batch of patches."""
        self._batches.observe(patches)

    def count_cells(self, cells: int) -> None:
        """Counts cells of a heat map."""
        self._cells.inc(cells)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Returns the counters and their content type, in the format that a client accepts."""
        encoder, kind = choose_encoder(accept or prometheus_client.CONTENT_TYPE_PLAIN_0_0_4)
        return encoder(self._registry), kind
