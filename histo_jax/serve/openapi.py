"""The description of the interface, OpenAPI 3.1: `/openapi.json`."""

from typing import Any

from histo_jax.serve import inference_protocol, tensors
from histo_jax.serve.limits import Limits, size
from histo_jax.serve.model_info import ModelInfo
from histo_jax.version import VERSION

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_FLAG = {"type": "boolean"}
_BINARY = {"type": "string", "contentMediaType": "application/octet-stream"}
_YES_NO = {"type": "string", "enum": ["true", "false"]}
_PROBABILITY = {"type": "number", "minimum": 0, "maximum": 1}


def document(info: ModelInfo, limits: Limits) -> dict[str, Any]:
    """Returns the description.

    Args:
        info: of the networks.
        limits: of requests.
    """
    model = f"/v2/models/{inference_protocol.MODEL}"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "histo_jax",
            "version": VERSION,
            "description": f"Probabilities of {info.positive} in H&E-stained images. Research use "
            "only: not a medical device.",
        },
        "paths": {
            "/v1/model": {"get": _get("The networks, their scores, and the limits", _object())},
            "/v1/slides": {"get": _get("Slides that a heat map can be made of", _slides())},
            "/v1/predict": {"post": _predict(info, limits)},
            "/v1/attribution": {"post": _attribution()},
            "/v1/heatmap": {"post": _heatmap(info, limits)},
            "/v2": {"get": _get("The server", _object())},
            "/v2/health/live": {"get": _get("Whether the server runs", _object("live"))},
            "/v2/health/ready": {"get": _ready()},
            model: {"get": _get("The tensors of the networks", _object("name", "inputs"))},
            f"{model}/ready": {"get": _ready()},
            f"{model}/infer": {"post": _infer(info, limits)},
            "/metrics": {"get": _get("Counters for Prometheus", _TEXT, "text/plain", "text/plain")},
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "properties": {"error": _TEXT},
                    "required": ["error"],
                }
            },
        },
        "security": [{}, {"token": []}],
    }


def _object(*required: str) -> dict[str, Any]:
    return {"type": "object", "required": list(required)}


def _content(schema: dict[str, Any], *kinds: str) -> dict[str, Any]:
    return {kind: {"schema": schema} for kind in kinds or ("application/json",)}


def _responses(description: str, content: dict[str, Any], **errors: str) -> dict[str, Any]:
    """Returns the answers of an operation.

    Args:
        description: of success.
        content: likewise.
        errors: reasons by status, as in `_413`.
    """
    problem = _content({"$ref": "#/components/schemas/Error"})
    reasons = {"401": "the token is missing or wrong", "403": "a request of another web page"}
    reasons |= {"421": "the Host header names another machine"}
    reasons |= {status.removeprefix("_"): reason for status, reason in errors.items()}
    return {
        "200": {"description": description, "content": content},
        **{
            status: {"description": reason, "content": problem}
            for status, reason in sorted(reasons.items())
        },
    }


def _get(summary: str, schema: dict[str, Any], *kinds: str) -> dict[str, Any]:
    return {"summary": summary, "responses": _responses(summary, _content(schema, *kinds))}


def _ready() -> dict[str, Any]:
    answer = _get("Whether the networks are compiled", _object("ready"))
    waiting = {"description": "not yet", "content": _content(_object("ready"))}
    answer["responses"]["503"] = waiting
    return answer


def _post(
    summary: str, fields: dict[str, Any], required: list[str], answers: dict[str, Any]
) -> dict[str, Any]:
    schema = {"type": "object", "properties": fields, "required": required}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _content(schema, "multipart/form-data")},
        "responses": answers,
    }


_FORM_ERRORS = {
    "_400": "the form cannot be read",
    "_408": "the request arrives too slowly",
    "_413": "more than the limits allow",
    "_415": "not a form",
    "_422": "a field or file cannot be used",
    "_429": "too much waits: repeat later",
    "_503": "starting, or out of time or memory: repeat later",
}


def _slides() -> dict[str, Any]:
    entry = {"type": "object", "properties": {"id": _TEXT}, "required": ["id"]}
    return {
        "type": "object",
        "properties": {"slides": {"type": "array", "items": entry}},
        "required": ["slides"],
    }


def _predict(info: ModelInfo, limits: Limits) -> dict[str, Any]:
    result = {
        "type": "object",
        "properties": {
            "name": _TEXT,
            "probability": _PROBABILITY,
            "logit": _NUMBER,
            "is_positive": _FLAG,
            "conversions": {"type": "array", "items": _TEXT},
            "preview": _TEXT,
            "error": _TEXT,
            "is_larger": _FLAG,
        },
        "required": ["name"],
        "oneOf": [{"required": ["probability", "logit"]}, {"required": ["error"]}],
    }
    answer = {
        "type": "object",
        "properties": {
            "results": {"type": "array", "items": result},
            "positive": _TEXT,
            "threshold": _PROBABILITY,
            "threshold_source": _TEXT,
        },
        "required": ["results", "threshold"],
    }
    files = {
        "type": "array",
        "items": _BINARY,
        "minItems": 1,
        "maxItems": limits.files,
        "description": f"patches of {info.size}x{info.size} pixels: TIFF, PNG or JPEG, together "
        f"at most {size(limits.body)}",
    }
    previews = {**_YES_NO, "description": "whether results have the patch as PNG, a data URL"}
    return _post(
        f"Probability of {info.positive} in each patch, in the order of the files",
        {"files": files, "previews": previews},
        ["files"],
        _responses("A result for each file", _content(answer), **_FORM_ERRORS),
    )


def _attribution() -> dict[str, Any]:
    return _post(
        "Picture of what raises (orange) and lowers (blue) the probability of a patch",
        {"file": _BINARY},
        ["file"],
        _responses("PNG", _content(_BINARY, "image/png"), **_FORM_ERRORS),
    )


def _heatmap(info: ModelInfo, limits: Limits) -> dict[str, Any]:
    own = "its own scale" if info.mpp is None else f"{info.mpp:g}"
    fields = {
        "file": {**_BINARY, "description": f"a picture of at most {limits.pixels:,} pixels"},
        "slide": {**_TEXT, "description": "id of a slide, instead of a file"},
        "mpp": {
            **_TEXT,
            "description": "micrometres a pixel; empty = as the file states them, and for "
            f"pictures without any those of the network, {own}",
        },
        "tissue": {"type": "string", "enum": ["auto", "all"]},
        "stride": {**_TEXT, "description": "distance of two cells, a multiple of the cell"},
        "probabilities": {**_YES_NO, "description": "whether the answer has each cell's number"},
    }
    answer = _object("name", "threshold", "cells", "highest", "thumbnail", "map")
    responses = _responses(
        "The map. A client that accepts application/x-ndjson gets lines {done, cells}, then the "
        "map or an error.",
        _content(answer, "application/json", "application/x-ndjson"),
        **_FORM_ERRORS,
        _404="the slide is not in the folder",
    )
    return _post(f"Heat map of {info.positive} on a picture or slide", fields, [], responses)


def _infer(info: ModelInfo, limits: Limits) -> dict[str, Any]:
    meta = tensors.metadata(info.size)
    shape = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    tensor = {
        "type": "object",
        "properties": {
            "name": {"const": tensors.INPUT},
            "datatype": {"const": meta["inputs"][0]["datatype"]},
            "shape": {**shape, "minItems": 4, "maxItems": 4},
            "data": {"type": "array", "description": "numbers from 0 to 255, nested or not"},
            "parameters": {"type": "object"},
        },
        "required": ["name", "datatype", "shape"],
    }
    output = {
        "type": "object",
        "properties": {"name": {"enum": list(tensors.OUTPUTS)}, "parameters": {"type": "object"}},
        "required": ["name"],
    }
    request = {
        "type": "object",
        "properties": {
            "id": _TEXT,
            "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
            "outputs": {"type": "array", "items": output},
            "parameters": {"type": "object"},
        },
        "required": ["inputs"],
    }
    summary = "Open Inference Protocol, with Triton's extension of binary tensors"
    errors = {
        "_400": "the request does not follow the protocol",
        "_408": "the request arrives too slowly",
        "_413": f"more than {size(limits.tensors)}",
        "_415": "compressed",
        "_429": "too much waits: repeat later",
        "_503": "starting, or out of time or memory: repeat later",
    }
    answers = _responses("The outputs", _content(_object("model_name", "outputs")), **errors)
    # Binary tensors follow the JSON.
    answers["200"]["content"]["application/octet-stream"] = {"schema": _BINARY}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _content(request)},
        "responses": answers,
    }
