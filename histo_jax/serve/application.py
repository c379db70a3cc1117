"""The application: which route answers which request."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from histo_jax.serve import heatmaps, inference_protocol, openapi, page_files, patches
from histo_jax.serve.answers import Endpoint, Json, route
from histo_jax.serve.security import Guard
from histo_jax.serve.service import Service

_METHODS = {
    404: "there is nothing at this address: see /openapi.json",
    405: "this address needs another method: see /openapi.json",
}


async def _model(request: Request, service: Service) -> Response:
    """Answers `GET /v1/model`: what the page says of the networks, and the limits."""
    info = dataclasses.asdict(service.info)
    return Json({**info, "is_ready": service.is_ready, "limits": service.limits._asdict()})


async def _metrics(request: Request, service: Service) -> Response:
    """Answers `GET /metrics`."""
    content, kind = service.metrics.render(request.headers.get("accept", ""))
    return Response(content, headers={"Content-Type": kind})


async def _openapi(request: Request, service: Service) -> Response:
    """Answers `GET /openapi.json`."""
    return Json(openapi.document(service.info, service.limits))


_NAME = "/v2/models/{name}"
_ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "/openapi.json", _openapi),
    ("GET", "/metrics", _metrics),
    ("GET", "/v1/model", _model),
    ("GET", "/v1/slides", heatmaps.slides),
    ("POST", "/v1/predict", patches.predict),
    ("POST", "/v1/attribution", patches.attribution),
    ("POST", "/v1/heatmap", heatmaps.heatmap),
    ("GET", "/v2", inference_protocol.server),
    ("GET", "/v2/health/live", inference_protocol.live),
    ("GET", "/v2/health/ready", inference_protocol.ready),
    ("GET", _NAME, inference_protocol.model),
    ("GET", f"{_NAME}/ready", inference_protocol.model_ready),
    ("POST", f"{_NAME}/infer", inference_protocol.infer),
    ("GET", f"{_NAME}/versions/{{version}}", inference_protocol.model),
    ("GET", f"{_NAME}/versions/{{version}}/ready", inference_protocol.model_ready),
    ("POST", f"{_NAME}/versions/{{version}}/infer", inference_protocol.infer),
)


def create(
    service: Service,
    hosts: frozenset[str],
    token: str | None,
    on_ready: Callable[[], object] = lambda: None,
) -> Starlette:
    """Returns the application.

    Args:
        service: the networks.
        hosts: names that requests may address, see `access.allowed_hosts`.
        token: that requests need; None = none.
        on_ready: called once the networks are compiled, or cannot be.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async def warm_up() -> None:
            await service.warm_up()
            on_ready()

        task = asyncio.ensure_future(warm_up())
        yield
        await asyncio.wait({task})
        service.close()

    routes = [Route(path, route(path, endpoint), methods=[m]) for m, path, endpoint in _ROUTES]
    app = Starlette(
        routes=[*routes, *page_files.routes()],
        middleware=[Middleware(Guard, hosts=hosts, token=token)],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = _METHODS.get(error.status_code, error.detail)
    return Json({"error": message}, error.status_code, dict(error.headers or {}))
