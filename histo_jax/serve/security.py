"""Who may ask: the Host header, the origin and the token of a request; headers of every answer."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

App = Callable[[Any, Any, Any], Awaitable[None]]

# The page itself, which asks for the token, and what monitors ask.
_WITHOUT_TOKEN = ("/", "/openapi.json", "/v2/health/live", "/v2/health/ready")
_STATIC = "/static/"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Results are those of patients.
    "Cache-Control": "no-store",
}


class Guard:
    """Middleware that refuses requests of other hosts, of other pages, and without the token.

    A web page of another site that a user has open could otherwise use the server: by a name whose
    address is changed to that of this machine, or by forms that it sends here.

    Args:
        app: the application.
        hosts: see `access.allowed_hosts`.
        token: that requests need; None = none.
    """

    def __init__(self, app: App, hosts: frozenset[str], token: str | None) -> None:
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves a request, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Any) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if _host_name(headers.get("host", "")) not in self._hosts:
            return _answer(421, "this host name is not known: start the server with --allow-hosts")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers["host"]:
            return _answer(403, "requests of other web pages are refused")
        path = scope["path"]
        if self._token and path not in _WITHOUT_TOKEN and not path.startswith(_STATIC):
            kind, _, given = headers.get("authorization", "").partition(" ")
            is_equal = hmac.compare_digest(given.strip().encode(), self._token.encode())
            if kind.lower() != "bearer" or not is_equal:
                answer = _answer(401, "send the header Authorization: Bearer TOKEN")
                answer.headers["WWW-Authenticate"] = "Bearer"
                return answer
        return None


def _host_name(host: str) -> str:
    """Returns the name in a Host header, without its port."""
    name, separator, port = host.rpartition(":")
    has_port = bool(separator) and port.isdecimal() and (":" not in name or name.endswith("]"))
    return (name if has_port else host).lower()


def _answer(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)
