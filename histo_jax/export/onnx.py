"""`model.onnx`: the predictor as one file of ordinary operators.

The graph is converted from what JAX traces, and so holds registered networks as well, as long as
their layers have a rule in `rules.py`.
"""

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from histo_jax.errors import UserError
from histo_jax.export.builder import ConversionError
from histo_jax.export.conversion import convert
from histo_jax.export.function import make_function
from histo_jax.export.graph import Graph, Node
from histo_jax.predictor import Predictor
from histo_jax.run import files

# Opset 18 is the oldest with all operators of `rules.py`; IR version 8 is the one of its time.
# Later versions add nothing that is used here, and older runtimes refuse them.
OPSET, _IR_VERSION = 18, 8
OUTPUTS = ("probability", "logit")
_LARGEST = 2**31 - 2**20  # a file of protocol buffers holds 2 GiB


def write(path: Path, predictor: Predictor, size: int, metadata: Mapping[str, str]) -> None:
    """Writes the model.

    Args:
        path: of the file.
        predictor: what it computes.
        size: height and width of the images.
        metadata: written into the model's `metadata_props`.

    Raises:
        UserError: a layer of a network has no equivalent, or the weights are larger than 2 GiB.
        OSError: the file cannot be written.
    """
    try:
        graph = convert(make_function(predictor, unrolled=True), (size, size, 3), OUTPUTS)
    except ConversionError as error:
        layer = f" of layer {error.layer}" if error.layer else ""
        raise UserError(
            f"ONNX cannot hold {error}{layer}: replace it in the network, or leave onnx out of "
            "--config.export.formats (stablehlo holds every network)"
        ) from None
    if sum(constant.nbytes for constant in graph.constants.values()) > _LARGEST:
        raise UserError(
            "the weights are larger than the 2 GiB of an ONNX file: leave onnx out of "
            "--config.export.formats"
        )
    model = make_model(graph, size, metadata)
    onnx.checker.check_model(model, full_check=True)
    files.write_bytes(path, model.SerializeToString(deterministic=True))


def make_model(graph: Graph, size: int, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Returns a graph of images as a model; for arguments see `write`."""
    images = helper.make_tensor_value_info(
        "images", TensorProto.UINT8, ["batch", size, size, 3], "RGB, 0 to 255"
    )
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]) for name in OUTPUTS
    ]
    model = helper.make_model(
        helper.make_graph(
            [_node(node) for node in graph.nodes],
            "histo_jax",
            [images],
            outputs,
            [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
        ),
        producer_name="histo_jax",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
    )
    helper.set_model_props(model, dict(metadata))
    return model


def _node(node: Node) -> onnx.NodeProto:
    attributes = dict(node.attributes)
    if node.op == "Cast":
        attributes["to"] = helper.np_dtype_to_tensor_dtype(attributes["to"])
    return helper.make_node(node.op, node.inputs, [node.output], **attributes)
