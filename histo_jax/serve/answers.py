"""How routes answer: errors as JSON of one form, time and status counted."""

import functools
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from histo_jax.serve.limits import Refused
from histo_jax.serve.receiving import ClientGone
from histo_jax.serve.service import Service

log = logging.getLogger("histo_jax")

FAILURE = "the server has failed: see its log"
_CLIENT_CLOSED = 499  # nginx's, for the counters alone

Endpoint = Callable[[Request, Service], Awaitable[Response]]


class Json(JSONResponse):
    """JSON in which a number that is not finite is a bug."""

    def render(self, content: Any) -> bytes:
        """Returns the text."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode(errors="backslashreplace")


def refusal(error: Refused) -> Json:
    """Returns the answer to a request that is refused."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 408:  # the rest of the body may still come
        headers["Connection"] = "close"
    return Json({"error": error.message}, error.status, headers)


def route(path: str, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Returns an endpoint as Starlette calls it.

    Args:
        path: as the counters name it.
        endpoint: answers a request, or raises `Refused`.
    """

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        service, began = request.app.state.service, time.monotonic()
        status = _CLIENT_CLOSED
        try:
            try:
                response = await endpoint(request, service)
                status = response.status_code
            except Refused as error:
                response = refusal(error)
                status = error.status
            except ClientGone:
                response = Response(status_code=400)  # nobody reads it
            except Exception:
                log.exception("%s failed", path)
                response = Json({"error": FAILURE}, 500)
                status = 500
        finally:
            service.metrics.count_request(path, status, time.monotonic() - began)
        return response

    return answer
