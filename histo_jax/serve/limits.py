"""How much the server accepts, and how it refuses more."""

from typing import NamedTuple


class Limits(NamedTuple):
    """What one request, and all requests together, may use.

    Attributes:
        body: bytes of a request.
        tensors: bytes of a request of the Open Inference Protocol; JSON takes many times as much
            memory as its text.
        received: bytes of all requests that are being received or answered.
        files: in one request.
        pixels: of a picture.
        patches: that wait for the networks, of all requests.
        maps: heat maps that wait or are computed.
        cells: of one heat map.
        receive_seconds: for a request to arrive.
        patch_seconds: for the patches of a request.
        map_seconds: for a heat map, after those before it.
    """

    body: int = 320 * 2**20
    tensors: int = 64 * 2**20
    received: int = 640 * 2**20
    files: int = 512
    pixels: int = 100_000_000
    patches: int = 4096
    maps: int = 8
    cells: int = 200_000
    receive_seconds: float = 120
    patch_seconds: float = 120
    map_seconds: float = 3600


class Refused(Exception):  # noqa: N818 - an answer
    """A request that is not answered as asked.

    Args:
        status: of HTTP.
        message: one line that names the reason and the fix, without a path of the server.
        retry_after: seconds; None = the same request fails again.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


def size(count: int) -> str:
    """Returns a number of bytes as people read it."""
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count:,} bytes"
