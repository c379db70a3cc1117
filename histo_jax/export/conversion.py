"""Converts a function of images that JAX has traced to a graph of ONNX operators.

What depends on the weights alone is computed here, so that the graph holds, for example, expanded
kernels and not the way to them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from histo_jax.export import rules
from histo_jax.export.builder import BATCH, Builder, ConversionError, Tensor, Value, batches
from histo_jax.export.graph import Graph

# Where an equation keeps the program that it calls, in the versions of JAX.
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# These call theirs several times, or not at all.
_CONTROL_FLOW = ("cond", "scan", "while")


def convert(
    function: Callable[[Any], Any], image_shape: Sequence[int], outputs: Sequence[str]
) -> Graph:
    """Returns the graph of a function of images, whose input is named `images`.

    Args:
        function: of uint8[batch, *image_shape], to a tuple of arrays.
        image_shape: height, width and channels.
        outputs: a name for each array.

    Raises:
        ConversionError: a layer of the function has no equivalent.
    """
    shape = (BATCH, *image_shape)
    traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, np.uint8))
    build = Builder()
    images = Tensor("images", tuple(range(len(shape))), shape)
    values = _run(build, traced.jaxpr, traced.consts, [images])
    for name, value, variable in zip(outputs, values, traced.jaxpr.outvars, strict=True):
        whole = build.in_order(build.expanded(value, variable.aval.shape))
        build.graph.add("Identity", [whole.name], name)
    build.graph.simplify(outputs)
    return build.graph


def _run(build: Builder, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
    """Converts a program and returns its outputs."""
    values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))

    def read(variable: Any) -> Value:
        if hasattr(variable, "val"):  # a literal
            return np.asarray(variable.val, variable.aval.dtype)
        return values[variable]

    for equation in jaxpr.eqns:
        try:
            outputs = _convert(build, equation, [read(variable) for variable in equation.invars])
        except ConversionError as error:
            # The stack of a called function begins at its call.
            layers = (str(equation.source_info.name_stack), error.layer)
            error.layer = "/".join(filter(None, layers))
            raise
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _convert(build: Builder, equation: Any, inputs: list[Value]) -> list[Value]:
    """Returns the outputs of one equation."""
    name, params = equation.primitive.name, equation.params
    called = next((params[key] for key in _CALLED if key in params), None)
    if called is not None and name not in _CONTROL_FLOW:
        consts = getattr(called, "consts", ())
        return _run(build, getattr(called, "jaxpr", called), consts, inputs)
    if name in rules.IDENTITIES:
        return inputs
    if name == "broadcast_in_dim":  # keeps constants small
        return [rules.broadcast(build, equation, inputs)]
    if not any(isinstance(value, Tensor) for value in inputs):
        return _evaluate(equation, inputs)
    if name in rules.ELEMENTWISE:
        return [build.elementwise(rules.ELEMENTWISE[name], inputs)]
    if name not in rules.RULES:
        raise ConversionError(f"the operation {name!r}")
    return [rules.RULES[name](build, equation, inputs)]


def _evaluate(equation: Any, inputs: list[Any]) -> list[Value]:
    """Computes what does not depend on the images."""
    if equation.primitive.name in rules.ELEMENTWISE:
        arrays = list(np.broadcast_arrays(*inputs))
    else:
        shapes = [variable.aval.shape for variable in equation.invars]
        if any(map(batches, (*shapes, equation.outvars[0].aval.shape))):
            raise ConversionError("a constant that depends on the number of images")
        arrays = [np.broadcast_to(value, s) for value, s in zip(inputs, shapes, strict=True)]
    outputs = equation.primitive.bind(*map(np.array, arrays), **equation.params)
    is_many = equation.primitive.multiple_results
    return [np.asarray(output) for output in (outputs if is_many else [outputs])]
