"""The files of the page, read once: no request names a path."""

import importlib.resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_INDEX = "index.html"


def routes() -> list[Route]:
    """Returns a route for each file: `/` is the page, `/static/NAME` what it uses."""
    folder = importlib.resources.files("histo_jax.serve") / "page"
    found = []
    for file in folder.iterdir():
        suffix = file.name[file.name.rindex(".") :]
        if suffix in _TYPES:
            path = "/" if file.name == _INDEX else f"/static/{file.name}"
            found.append(_route(path, file.read_bytes(), _TYPES[suffix]))
    return found


def _route(path: str, content: bytes, kind: str) -> Route:
    async def answer(request: Request) -> Response:
        # Another version of the server may have another page.
        return Response(content, headers={"Content-Type": kind, "Cache-Control": "no-cache"})

    return Route(path, answer, methods=["GET"], name=path)
