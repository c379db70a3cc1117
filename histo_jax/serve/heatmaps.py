"""Routes of heat maps, and of the slides that a client may name."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from histo_jax import malloc
from histo_jax.serve.answers import FAILURE, Json
from histo_jax.serve.batching import finished, within
from histo_jax.serve.limits import Refused
from histo_jax.serve.receiving import File, Form, disconnect, while_connected
from histo_jax.serve.region_map import Options, RegionMap, parse_mpp, parse_stride
from histo_jax.serve.service import Service
from histo_jax.slides.search import SlideFile

log = logging.getLogger("histo_jax")

_STREAM = "application/x-ndjson"
_SECONDS_BETWEEN = 0.5

Progress = Callable[[int, int], object]


async def slides(request: Request, service: Service) -> Response:
    """Answers `GET /v1/slides`: the ids of the slides that a heat map can be made of."""
    return Json({"slides": [{"id": name} for name in service.slides.ids]})


async def heatmap(request: Request, service: Service) -> Response:
    """Answers `POST /v1/heatmap`: the map of a picture, or of a slide of the folder.

    A client that accepts application/x-ndjson gets lines of JSON: the progress, then the map.
    """
    service.check_ready()
    if service.maps >= service.limits.maps:
        raise Refused(
            429,
            f"{service.maps} heat maps are being made or wait: repeat the request later",
            retry_after=30,
        )
    resources = contextlib.AsyncExitStack()
    async with resources:
        resources.enter_context(_counted(service))
        form = await resources.enter_async_context(service.receiver.form(request))
        source, name, options = _parse(form, service)
        if _STREAM in request.headers.get("accept", ""):
            return _Lines(service, (source, name, options), resources.pop_all())
        work = _make_map(service, source, name, options, lambda done, cells: None)
        return Json(await while_connected(request, work))
    raise AssertionError  # for mypy: an exit stack may suppress exceptions


class _Lines(Response):
    """Lines of JSON: the progress of a map, then the map or the error.

    Args:
        service: the networks.
        job: arguments of `_make_map`.
        resources: released once the map is done or its client has left.
    """

    media_type = _STREAM

    def __init__(
        self,
        service: Service,
        job: tuple[File | SlideFile, str, Options],
        resources: contextlib.AsyncExitStack,
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._progress = 0, 0
        self._task = asyncio.ensure_future(self._make(service, job, resources))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the lines until the map is done."""
        leaving = asyncio.ensure_future(disconnect(receive))
        try:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            while not self._task.done() and not leaving.done():
                done, cells = self._progress
                await self._send(send, {"done": done, "cells": cells})
                tasks = {self._task, leaving}
                await asyncio.wait(tasks, timeout=_SECONDS_BETWEEN, return_when="FIRST_COMPLETED")
            if self._task.done():
                await self._send(send, self._task.result())
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()
            self._task.cancel()

    async def _make(
        self, service: Service, job: Any, resources: contextlib.AsyncExitStack
    ) -> dict[str, Any]:
        """Returns the map, or the error as an answer has it."""
        source, name, options = job
        async with resources:
            try:
                return await _make_map(service, source, name, options, self._show)
            except Refused as error:
                return {"error": error.message}
            except Exception:
                log.exception("a heat map failed")
                return {"error": FAILURE}
        raise AssertionError  # for mypy

    def _show(self, done: int, cells: int) -> None:
        self._progress = done, cells

    @staticmethod
    async def _send(send: Any, line: dict[str, Any]) -> None:
        body = bytes(Json(line).body) + b"\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})


@contextlib.contextmanager
def _counted(service: Service) -> Iterator[None]:
    service.maps += 1
    try:
        yield
    finally:
        service.maps -= 1
        malloc.return_freed()  # of a large picture


def _parse(form: Form, service: Service) -> tuple[File | SlideFile, str, Options]:
    files, named = form.files("file"), form.text("slide")
    if len(files) + bool(named) != 1:
        raise Refused(
            422,
            "send one picture in the field file, or the id of a slide in the field slide "
            "(GET /v1/slides)",
        )
    tissue = form.text("tissue") or "auto"
    if tissue not in ("auto", "all"):
        raise Refused(422, f"tissue is {tissue[:20]!r}: give auto or all")
    options = Options(
        parse_mpp(form.text("mpp")),
        tissue,
        parse_stride(form.text("stride"), service.predictor.patch.cell),
        form.flag("probabilities"),
    )
    if files:
        return files[0], files[0].name, options
    slide = service.slides.get(named)
    if slide is None:
        raise Refused(404, "the slide is not in the folder: see GET /v1/slides")
    return slide, named, options


async def _make_map(
    service: Service,
    source: File | SlideFile,
    name: str,
    options: Options,
    on_cells: Progress,
) -> dict[str, Any]:
    """Makes a map once those before it are done."""
    async with service.map_lock:
        region = RegionMap(service, source, name, options, on_cells)
        try:
            return await within(service.limits.map_seconds, _steps(service, region))
        finally:
            region.close()


async def _steps(service: Service, region: RegionMap) -> dict[str, Any]:
    await service.decode(region.open, cancel=region.cancel)
    await finished(service.thread.submit(region.compute), region.cancel)
    return await service.decode(region.answer)
