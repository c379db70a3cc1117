"""Routes of the Open Inference Protocol, which Triton and KServe speak.

https://github.com/kserve/open-inference-protocol, with Triton's extension of binary tensors.
"""

from typing import Any

import numpy as np
from scipy.special import expit
from starlette.requests import Request
from starlette.responses import Response

from histo_jax.serve import tensors
from histo_jax.serve.answers import Json
from histo_jax.serve.batching import within
from histo_jax.serve.limits import Refused
from histo_jax.serve.receiving import while_connected
from histo_jax.serve.service import Service
from histo_jax.version import VERSION

MODEL, MODEL_VERSION = "histo_jax", "1"
_LENGTH = "Inference-Header-Content-Length"


async def live(request: Request, service: Service) -> Response:
    """Answers `GET /v2/health/live`."""
    return Json({"live": True})


async def ready(request: Request, service: Service) -> Response:
    """Answers `GET /v2/health/ready`: 503 until all programs are compiled."""
    return Json({"ready": service.is_ready}, 200 if service.is_ready else 503)


async def server(request: Request, service: Service) -> Response:
    """Answers `GET /v2`."""
    return Json({"name": "histo_jax", "version": VERSION, "extensions": ["binary_tensor_data"]})


async def model(request: Request, service: Service) -> Response:
    """Answers `GET /v2/models/NAME`: the tensors."""
    _check_model(request)
    return Json(
        {
            "name": MODEL,
            "versions": [MODEL_VERSION],
            "platform": "jax",
            **tensors.metadata(service.info.size),
        }
    )


async def model_ready(request: Request, service: Service) -> Response:
    """Answers `GET /v2/models/NAME/ready`."""
    _check_model(request)
    return Json({"name": MODEL, "ready": service.is_ready}, 200 if service.is_ready else 503)


async def infer(request: Request, service: Service) -> Response:
    """Answers `POST /v2/models/NAME/infer`: probability and logit of each image."""
    _check_model(request)
    service.check_ready()
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "compressed requests are not supported: send it as it is")
    length = request.headers.get(_LENGTH)
    if length is not None and not (length.isascii() and length.isdecimal() and len(length) < 12):
        raise Refused(400, f"{_LENGTH} must be a number of bytes")
    async with service.receiver.content(request, service.limits.tensors) as content:
        work = _infer(service, content, None if length is None else int(length))
        return await while_connected(request, within(service.limits.patch_seconds, work))
    raise AssertionError  # for mypy


async def _infer(service: Service, content: bytes, length: int | None) -> Response:
    inference = await service.decode(
        tensors.Inference, content, length, service.info.size, service.limits.patches
    )
    logits = await service.thread.logits(inference.images)
    if not np.isfinite(logits).all():
        raise Refused(500, "the network returned a number that is not finite")
    values = {"probability": expit(logits), "logit": logits}
    body = inference.answer(values, MODEL, MODEL_VERSION)
    if inference.header_length is None:
        return Response(body, media_type="application/json")
    headers = {_LENGTH: str(inference.header_length)}
    return Response(body, headers=headers, media_type="application/octet-stream")


def _check_model(request: Request) -> None:
    name: Any = request.path_params["name"]
    version: Any = request.path_params.get("version", MODEL_VERSION)
    if name != MODEL or version != MODEL_VERSION:
        raise Refused(404, f"the only model is {MODEL}, of version {MODEL_VERSION}")
