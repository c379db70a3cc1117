"""Runs the application until a signal: sockets, connections and the end of the process."""

import contextlib
import errno
import logging
import os
import signal
import socket
import threading
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from histo_jax.errors import ConfigError

log = logging.getLogger("histo_jax")
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # as `log_level` below

_CONNECTIONS = 512
_KEEP_ALIVE = 15  # seconds
_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Args:
        host: an address, or a name of this machine.
        port: 0 = any that is free.

    Raises:
        ConfigError: it cannot be had; names the fix.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_CONNECTIONS)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port={port} is in use: choose another, or 0 for any") from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"--port={port} needs more rights: choose one above 1023") from None
        raise ConfigError(
            f"--host={host} --port={port}: {reason}; give an address of this machine"
        ) from None


def url(listener: socket.socket) -> str:
    """Returns the address of a socket for browsers."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class Server(uvicorn.Server):
    """Serves an application; SIGTERM and Ctrl-C let it finish what is under way.

    Args:
        app: the application.
        receive_seconds: after which a connection is closed whose request is not complete.
    """

    def __init__(self, app: Starlette, receive_seconds: float) -> None:
        class Protocol(_Protocol):
            seconds = receive_seconds

        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                log_level="error",  # clients cause the warnings, and could fill the log
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                limit_concurrency=_CONNECTIONS,
            )
        )
        self._first_signal = 0

    def serve_until_signal(self, listener: socket.socket) -> int:
        """Serves a socket; returns the exit status: 0, or 130 after Ctrl-C."""
        self.run([listener])
        return _INTERRUPTED if self._first_signal == signal.SIGINT else 0

    def capture_signals(self) -> Any:
        """Handles signals without raising them again at the end, as uvicorn does."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
                    signal.signal(number, self.handle_exit)
        return contextlib.nullcontext()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends the server; a second signal ends it at once."""
        if self._first_signal:
            os._exit(128 + sig)
        self._first_signal = sig
        log.info("finishing the requests under way; a second signal ends the server at once")
        self.should_exit = True


class _Protocol(H11Protocol):
    """Closes connections on which a request does not arrive, or an answer is not read, in time.

    The application limits the time of bodies that it reads; this is for headers, and for bodies
    that it has refused.
    """

    seconds: float
    _watch: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._restart()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_answering = self._watch is None
        super().data_received(data)
        if self._is_received():
            self._stop()
        elif was_answering:
            self._restart()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._restart_unless_answering()  # the next request may have come

    def pause_writing(self) -> None:
        super().pause_writing()
        self._restart()  # a client that does not read would keep the server from its end

    def resume_writing(self) -> None:
        super().resume_writing()
        self._restart_unless_answering()

    def _is_received(self) -> bool:
        # MUST_CLOSE after requests with `Connection: close`, and those of HTTP/1.0.
        return self.conn.their_state.__name__ in ("DONE", "MUST_CLOSE")

    def _restart_unless_answering(self) -> None:
        if self._is_received() and not self.cycle.response_complete:
            self._stop()
            self._unset_keepalive_if_required()  # which uvicorn has just set
        else:
            self._restart()

    def _restart(self) -> None:
        self._stop()
        # A body may take as long as the application allows, which then answers.
        self._watch = self.loop.call_later(self.seconds + _KEEP_ALIVE, self.transport.abort)

    def _stop(self) -> None:
        if self._watch:
            self._watch.cancel()
            self._watch = None
