"""Tensors of the Open Inference Protocol, in JSON and in the binary form of its extension."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histo_jax.serve.limits import Refused

INPUT, OUTPUTS = "images", ("probability", "logit")
_DATATYPES = {"images": "UINT8", "probability": "FP64", "logit": "FP64"}


def metadata(size: int) -> dict[str, Any]:
    """Returns names, types and shapes of the tensors.

    Args:
        size: height and width of a patch.
    """
    return {
        "inputs": [{"name": INPUT, "datatype": _DATATYPES[INPUT], "shape": [-1, size, size, 3]}],
        "outputs": [
            {"name": name, "datatype": _DATATYPES[name], "shape": [-1]} for name in OUTPUTS
        ],
    }


class Inference:
    """A request for inference.

    Args:
        content: of the request.
        header_length: bytes of its JSON, which binary tensors follow; None = all.
        size: height and width of a patch.
        patches: that a request may have.

    Attributes:
        id: of the request, '' = none.
        images: uint8[n, size, size, 3].

    Raises:
        Refused: the request does not follow the protocol, or asks for other tensors.
    """

    def __init__(self, content: bytes, header_length: int | None, size: int, patches: int) -> None:
        end = len(content) if header_length is None else header_length
        if end > len(content):
            raise _bad("Inference-Header-Content-Length is more than the request has")
        request = _parse(content[:end])
        self.id = request.get("id", "")
        if not isinstance(self.id, str) or len(self.id) > 200:
            raise _bad("id must be text of at most 200 characters")
        self._outputs = _outputs(request)
        self.images = _images(request, content[end:], size, patches)

    def answer(self, values: Mapping[str, np.ndarray], model: str, version: str) -> bytes:
        """Returns the body of the answer; see also `header_length`.

        Args:
            values: float64[n] of each output.
            model: its name.
            version: likewise.
        """
        outputs, binary = [], b""
        for name, is_binary in self._outputs.items():
            array = values[name]
            output: dict[str, Any] = {
                "name": name,
                "datatype": _DATATYPES[name],
                "shape": list(array.shape),
            }
            if is_binary:
                content = array.astype("<f8").tobytes()
                output["parameters"] = {"binary_data_size": len(content)}
                binary += content
            else:
                output["data"] = array.tolist()
            outputs.append(output)
        answer = {"model_name": model, "model_version": version, "outputs": outputs}
        text = json.dumps(answer | ({"id": self.id} if self.id else {}), allow_nan=False).encode()
        self.header_length = len(text) if binary or any(self._outputs.values()) else None
        return text + binary

    header_length: int | None = None


def _bad(message: str) -> Refused:
    return Refused(400, message)


def _parse(text: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise _bad(f"{name} is not a number of JSON")

    try:
        request = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):  # also of text that is not UTF-8, and of endless numbers
        raise _bad("the request is not JSON that can be read") from None
    if not isinstance(request, dict):
        raise _bad("the request must be an object with inputs")
    return request


def _parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    parameters = values.get("parameters", {})
    if not isinstance(parameters, dict):
        raise _bad("parameters must be an object")
    if any(name.startswith("shared_memory") for name in parameters):
        raise _bad("shared memory is not supported: send the data")
    return parameters


def _outputs(request: Mapping[str, Any]) -> dict[str, bool]:
    """Returns the outputs that are asked for, and whether each is to be binary."""
    default = _parameters(request).get("binary_data_output", False) is True
    requested = request.get("outputs") or [{"name": name} for name in OUTPUTS]
    if not isinstance(requested, list) or not all(isinstance(output, dict) for output in requested):
        raise _bad("outputs must be a list of objects with a name")
    outputs = {}
    for output in requested:
        if output.get("name") not in OUTPUTS:
            raise _bad(f"the outputs are {' and '.join(OUTPUTS)}")
        parameters = _parameters(output)
        if parameters.get("classification"):
            raise _bad("the parameter classification is not supported: leave it out")
        outputs[output["name"]] = parameters.get("binary_data", default) is True
    return outputs


def _images(request: Mapping[str, Any], binary: bytes, size: int, patches: int) -> np.ndarray:
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise _bad(f"inputs must be a list of one tensor, {INPUT}")
    (tensor,) = inputs
    if tensor.get("name") != INPUT or tensor.get("datatype") != _DATATYPES[INPUT]:
        raise _bad(f"the input is {INPUT} of datatype {_DATATYPES[INPUT]}")
    shape = tensor.get("shape")
    is_shape = isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape)
    if not is_shape or shape[1:] != [size, size, 3] or len(shape) != 4:
        raise _bad(f"the shape of {INPUT} must be [n, {size}, {size}, 3]")
    if shape[0] > patches:
        raise Refused(413, f"{shape[0]:,} patches are more than {patches:,}: send fewer at once")
    count = shape[0] * size * size * 3
    stated = _parameters(tensor).get("binary_data_size")
    if stated is not None:
        if stated != count or len(binary) != count:
            raise _bad(f"the binary data of {INPUT} must have {count:,} bytes, one a channel")
        return np.frombuffer(binary, np.uint8).reshape(shape)
    if binary:
        raise _bad("binary data needs the parameter binary_data_size")
    return _flat(tensor.get("data"), count).reshape(shape)


def _flat(data: Any, count: int) -> np.ndarray:
    """Returns uint8[count] of numbers, nested or not."""
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise _bad(f"the data of {INPUT} must be a list of numbers")
    # As objects: in an array of text, each item would take the memory of the longest one.
    array = np.asarray(data, object)
    kinds = set(map(type, array.flat))
    if list in kinds:  # lists of different lengths
        raise _bad(f"the data of {INPUT} must be numbers, as many as its shape says")
    if array.size != count:
        raise _bad(f"the data of {INPUT} has {array.size:,} numbers, and its shape {count:,}")
    if not count:
        return np.zeros(0, np.uint8)
    if kinds != {int} or array.min() < 0 or array.max() > 255:
        raise _bad(f"the data of {INPUT} must be whole numbers from 0 to 255")
    return array.astype(np.uint8).ravel()
