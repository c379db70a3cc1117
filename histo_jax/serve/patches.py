"""Routes of patches: probabilities, and the attribution of one."""

import math
from typing import Any

import numpy as np
from scipy.special import expit
from starlette.requests import Request
from starlette.responses import Response

from histo_jax.report.patches import draw_attribution
from histo_jax.serve.answers import Json
from histo_jax.serve.batching import within
from histo_jax.serve.decoding import PatchFile, data_url, decode_patches, encode
from histo_jax.serve.limits import Refused
from histo_jax.serve.receiving import while_connected
from histo_jax.serve.service import Service


async def predict(request: Request, service: Service) -> Response:
    """Answers `POST /v1/predict`: the probability of each file, in their order."""
    service.check_ready()
    async with service.receiver.form(request) as form:
        files, with_previews = form.files("files"), form.flag("previews")
        if not files:
            raise Refused(422, "the form has no files: send them in the field files")
        work = _predict(service, files, with_previews)
        results = await while_connected(request, within(service.limits.patch_seconds, work))
    return Json({"results": results, **_operating_point(service)})


async def _predict(service: Service, files: list[Any], with_previews: bool) -> list[dict]:
    info = service.info
    decoded = await service.decode(decode_patches, files, info.size, info.is_scaled)
    pixels = [patch.pixels for patch in decoded if patch.pixels is not None]
    images = np.stack(pixels) if pixels else np.zeros((0, info.size, info.size, 3), np.uint8)
    remaining = iter(await service.thread.logits(images))
    logits = [math.nan if patch.pixels is None else float(next(remaining)) for patch in decoded]
    return await service.decode(
        lambda: [
            _result(patch, logit, info.threshold, with_previews)
            for patch, logit in zip(decoded, logits, strict=True)
        ]
    )


def _result(patch: PatchFile, logit: float, threshold: float, with_preview: bool) -> dict[str, Any]:
    if patch.pixels is None:
        return {"name": patch.name, "error": patch.error, "is_larger": patch.is_larger}
    if not math.isfinite(logit):
        error = "the network returned a number that is not finite"
        return {"name": patch.name, "error": error, "is_larger": False}
    probability = float(expit(logit))
    result = {
        "name": patch.name,
        "probability": probability,
        "logit": logit,
        "is_positive": probability >= threshold,
        "conversions": list(patch.conversions),
    }
    # Browsers do not show TIFF.
    return result | ({"preview": data_url(patch.pixels, "png")} if with_preview else {})


async def attribution(request: Request, service: Service) -> Response:
    """Answers `POST /v1/attribution`: a picture of what each pixel adds to the logit."""
    service.check_ready()
    async with service.receiver.form(request) as form:
        files = form.files("file")
        if len(files) != 1:
            raise Refused(422, f"the form has {len(files)} files: send one, in the field file")
        work = _attribution(service, files)
        content = await while_connected(request, within(service.limits.patch_seconds, work))
    return Response(content, media_type="image/png")


async def _attribution(service: Service, files: list[Any]) -> bytes:
    info = service.info
    (patch,) = await service.decode(decode_patches, files, info.size, info.is_scaled)
    if patch.pixels is None:
        raise Refused(422, f"{patch.name} {patch.error}")
    pixels = patch.pixels
    maps = await service.attribution(pixels)
    return await service.decode(lambda: encode(draw_attribution(pixels, maps), "png"))


def _operating_point(service: Service) -> dict[str, Any]:
    return {
        "positive": service.info.positive,
        "threshold": service.info.threshold,
        "threshold_source": service.info.threshold_source,
    }
