"""Receives the bodies of requests into memory, within limits; nothing is written to disk."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from histo_jax import malloc
from histo_jax.serve.limits import Limits, Refused, size

Result = TypeVar("Result")

# Fields of a form beside its files.
_FIELDS = 20
_LONGEST_NAME = 255
# Others of Python fail, or take minutes for a megabyte.
_CHARSETS = (b"utf-8", b"us-ascii", b"iso-8859-1")
# Memory of requests is returned to the system once none is left, if they had more bytes than this.
_KEPT = 32 * 2**20


class File(NamedTuple):
    """A file of a form: its name as the client gives it, and its content."""

    name: str
    content: bytes


class Form:
    """A form.

    Args:
        items: name and value of each field, in order.
    """

    def __init__(self, items: list[tuple[str, File | str]]) -> None:
        self._items = items

    def files(self, field: str) -> list[File]:
        """Returns the files of a field, in order."""
        return [value for key, value in self._items if key == field and isinstance(value, File)]

    def text(self, field: str) -> str:
        """Returns the text of a field, '' where it is missing."""
        texts = [value for key, value in self._items if key == field and isinstance(value, str)]
        return texts[-1].strip() if texts else ""

    def flag(self, field: str) -> bool:
        """Returns whether a field says yes.

        Raises:
            Refused: it is neither true nor false.
        """
        text = self.text(field).lower() or "false"
        if text not in ("true", "false"):
            raise Refused(422, f"{field} is {text[:20]!r}: give true or false")
        return text == "true"


class ClientGone(Exception):  # noqa: N818 - no error of the server
    """The client has closed the connection."""


class _InMemory(MultiPartParser):
    spool_max_size = sys.maxsize


class Receiver:
    """Receives bodies; all together take at most `limits.received` bytes.

    Args:
        limits: of the server.

    Attributes:
        held: bytes of the requests that are being received or answered.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held = self._most_held = 0

    @contextlib.asynccontextmanager
    async def form(self, request: Request) -> AsyncIterator[Form]:
        """Receives a form.

        Raises:
            Refused: it is no form, or too large, or arrives too slowly.
            ClientGone: the client has left.
        """
        kind = request.headers.get("content-type", "")
        if not kind.lower().startswith("multipart/form-data"):
            raise Refused(415, "send a form: Content-Type multipart/form-data, with a boundary")
        charset = parse_options_header(kind)[1].get(b"charset", b"utf-8").lower()
        if charset not in _CHARSETS:
            raise Refused(415, "the charset of the form is not supported: send UTF-8")
        async with self._receive(request, self._limits.body) as chunks:
            parser = _InMemory(
                request.headers, chunks, max_files=self._limits.files, max_fields=_FIELDS
            )
            try:
                async with asyncio.timeout(self._limits.receive_seconds):
                    form = await parser.parse()
            except TimeoutError:
                raise self._too_slow() from None
            except MultiPartException as error:
                status = 413 if error.message.startswith(("Too many", "Part exceeded")) else 400
                raise Refused(status, error.message.rstrip(".")) from None
            try:
                # Pillow would write a temporary file of Starlette to disk, to read it by libtiff.
                received = [(key, await _content(value)) for key, value in form.multi_items()]
            finally:
                await form.close()
            yield Form(received)

    @contextlib.asynccontextmanager
    async def content(self, request: Request, limit: int) -> AsyncIterator[bytes]:
        """Receives a body as bytes; raises as `form` does.

        Args:
            request: of HTTP.
            limit: bytes of the body.
        """
        async with self._receive(request, limit) as chunks:
            content = bytearray()
            try:
                async with asyncio.timeout(self._limits.receive_seconds):
                    async for chunk in chunks:
                        content += chunk
            except TimeoutError:
                raise self._too_slow() from None
            yield bytes(content)

    @contextlib.asynccontextmanager
    async def _receive(
        self, request: Request, limit: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Yields the chunks of a body, whose bytes are counted until the end."""
        own = 0

        async def chunks() -> AsyncGenerator[bytes, None]:
            nonlocal own
            stated = request.headers.get("content-length", "0")
            if stated.isdecimal() and len(stated) < 20 and int(stated) > limit:
                raise _too_large(limit)
            try:
                async for chunk in request.stream():
                    own += len(chunk)
                    self.held += len(chunk)
                    self._most_held = max(self._most_held, self.held)
                    if own > limit:
                        raise _too_large(limit)
                    if self.held > self._limits.received:
                        raise Refused(
                            503,
                            "other requests take all of the memory for files: repeat the request "
                            "later",
                            retry_after=10,
                        )
                    yield chunk
            except ClientDisconnect:
                raise ClientGone from None

        try:
            yield chunks()
        finally:
            self.held -= own
            if not self.held:
                if self._most_held > _KEPT:
                    malloc.return_freed()
                self._most_held = 0

    def _too_slow(self) -> Refused:
        return Refused(
            408,
            f"the request took more than {self._limits.receive_seconds:g} s to arrive: send fewer "
            "files",
        )


def _too_large(limit: int) -> Refused:
    return Refused(
        413, f"the request has more than {size(limit)}: send fewer files, or a smaller picture"
    )


async def _content(value: UploadFile | str) -> File | str:
    if isinstance(value, str):
        return value
    name = (value.filename or "unnamed").encode(errors="replace").decode()
    return File(name[:_LONGEST_NAME], await value.read())


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of work that is cancelled once the client has left.

    Args:
        request: whose body was received.
        work: what answers it.

    Raises:
        ClientGone: the client has left.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(disconnect(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns once the client of a request, whose body was received, has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
