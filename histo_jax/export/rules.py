"""The ONNX operators of each primitive of JAX."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from histo_jax.export.builder import Builder, ConversionError, Tensor, Value, batches
from histo_jax.export.graph import END

# From a builder, an equation of JAX, and its inputs, to its output.
Rule = Callable[[Builder, Any, Sequence[Value]], Value]

# Primitives that compute each element by itself, and their operators.
ELEMENTWISE = {
    "abs": "Abs", "add": "Add", "add_any": "Add", "and": "And", "ceil": "Ceil", "cos": "Cos",
    "div": "Div", "eq": "Equal", "erf": "Erf", "exp": "Exp", "floor": "Floor",
    "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "log": "Log",
    "logistic": "Sigmoid", "lt": "Less", "max": "Max", "min": "Min", "mul": "Mul", "neg": "Neg",
    "not": "Not", "or": "Or", "pow": "Pow", "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt",
    "sub": "Sub", "tanh": "Tanh",
}  # fmt: skip
IDENTITIES = ("copy", "copy_p", "stop_gradient")
RULES: dict[str, Rule] = {}


def _rule(*primitives: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, rule))
        return rule

    return register


def _operand(
    build: Builder,
    equation: Any,
    inputs: Sequence[Value],
    index: int = 0,
    order: Sequence[int] | None = None,
) -> Tensor:
    """Returns an input of an equation with its whole shape, and its axes in an order if given."""
    value, shape = inputs[index], equation.invars[index].aval.shape
    if isinstance(value, np.ndarray) and not batches(shape):
        return build.in_order(np.broadcast_to(value, shape), order)
    whole = build.expanded(value, shape)
    return whole if order is None else build.in_order(whole, order)


def _output_shape(equation: Any) -> tuple[int, ...]:
    return tuple(equation.outvars[0].aval.shape)


@_rule("broadcast_in_dim")
def broadcast(build: Builder, equation: Any, inputs: Sequence[Value]) -> Value:
    """Inserts the new axes with a size of 1; what uses the value broadcasts them."""
    (value, *_), axes = inputs, equation.params["broadcast_dimensions"]
    own = value.shape or (1,) * len(axes)
    shape = [own[axes.index(i)] if i in axes else 1 for i in range(len(_output_shape(equation)))]
    return value.reshape(shape) if isinstance(value, np.ndarray) else build.reshape(value, shape)


@_rule("reshape", "squeeze", "expand_dims")
def _reshape(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    return build.reshape(_operand(build, equation, inputs), _output_shape(equation))


@_rule("transpose")
def _transpose(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    value, axes = _operand(build, equation, inputs), equation.params["permutation"]
    order = tuple(axes.index(axis) for axis in value.order)
    return Tensor(value.name, order, _output_shape(equation))


@_rule("convert_element_type")
def _cast(build: Builder, equation: Any, inputs: Sequence[Value]) -> Value:
    (value,) = inputs
    assert isinstance(value, Tensor)
    new = np.dtype(equation.params["new_dtype"])
    if equation.invars[0].aval.dtype == new:
        return value
    return build.add("Cast", [value], value.shape, order=value.order, to=new)


@_rule("conv_general_dilated")
def _convolution(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    params = equation.params
    if params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
        raise ConversionError("a transposed convolution")
    images, kernel, output = params["dimension_numbers"]
    begins, ends = zip(*params["padding"], strict=True)
    if min(*begins, *ends) < 0:
        raise ConversionError("a convolution with negative padding")
    operands = [
        _operand(build, equation, inputs, index, order)
        for index, order in enumerate((images, kernel))
    ]
    return build.add(
        "Conv",
        operands,
        _output_shape(equation),
        order=output,
        strides=list(params["window_strides"]),
        pads=[*begins, *ends],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )


@_rule("dot_general")
def _dot(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    (left_axes, right_axes), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (build.in_order(_operand(build, equation, inputs, index)) for index in (0, 1))
    shape = _output_shape(equation)
    is_product = not left_batch and tuple(left_axes) == (len(left.shape) - 1,)
    if is_product and tuple(right_axes) == (0,) and len(right.shape) == 2:
        return build.add("MatMul", [left, right], shape)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first = [next(letters) for _ in left.shape]
    shared = dict(zip((*right_batch, *right_axes), (*left_batch, *left_axes), strict=True))
    second = [first[shared[i]] if i in shared else next(letters) for i in range(len(right.shape))]
    used = {*left_batch, *left_axes}
    result = [first[i] for i in left_batch]
    result += [first[i] for i in range(len(first)) if i not in used]
    result += [second[i] for i in range(len(second)) if i not in shared]
    terms = f"{''.join(first)},{''.join(second)}->{''.join(result)}"
    return build.add("Einsum", [left, right], shape, equation=terms)


_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


@_rule(*_REDUCTIONS)
def _reduce(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    value, axes = _operand(build, equation, inputs), equation.params["axes"]
    own = np.array([value.order.index(axis) for axis in axes], np.int64)
    kept = [axis for axis in value.order if axis not in axes]
    return build.add(
        _REDUCTIONS[equation.primitive.name],
        [value],
        _output_shape(equation),
        order=[sorted(kept).index(axis) for axis in kept],
        constants=[own],
        keepdims=0,
    )


@_rule("reduce_window_max", "reduce_window_sum")
def _pool(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    params, shape = equation.params, _output_shape(equation)
    window, is_max = params["window_dimensions"], equation.primitive.name == "reduce_window_max"
    outer = [axis for axis, size in enumerate(window) if size == 1][:1]
    outer += [axis for axis, size in enumerate(window) if size == 1][1:][-1:]
    spatial = [axis for axis in range(len(window)) if axis not in outer]
    dilations = [params["window_dilation"][axis] for axis in spatial]
    if (
        len(outer) != 2
        or set(params["base_dilation"]) != {1}
        or any(params["window_strides"][i] != 1 or any(params["padding"][i]) for i in outer)
        or not (is_max or set(dilations) == {1})
    ):
        raise ConversionError("a pooling that is not over height and width alone")
    order = (*outer, *spatial)
    pooled = build.add(
        "MaxPool" if is_max else "AveragePool",
        [_operand(build, equation, inputs, order=order)],
        shape,
        order=order,
        kernel_shape=[window[axis] for axis in spatial],
        strides=[params["window_strides"][axis] for axis in spatial],
        pads=[params["padding"][axis][side] for side in (0, 1) for axis in spatial],
        **({"dilations": dilations} if is_max else {"count_include_pad": 1}),
    )
    if is_max:
        return pooled
    return build.elementwise("Mul", [pooled, np.array(math.prod(window), np.float32)])


@_rule("slice")
def _slice(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    params, value = equation.params, _operand(build, equation, inputs)
    starts, ends = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(starts)
    return _cut(build, value, starts, ends, steps, _output_shape(equation))


@_rule("rev")
def _reverse(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    value, axes = _operand(build, equation, inputs), equation.params["dimensions"]
    bounds = [
        (-1, -END, -1) if axis in axes else (0, size, 1) for axis, size in enumerate(value.shape)
    ]
    starts, ends, steps = zip(*bounds, strict=True)
    return _cut(build, value, starts, ends, steps, value.shape)


def _cut(
    build: Builder,
    value: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    steps: Sequence[int],
    shape: Sequence[int],
) -> Tensor:
    """Adds a slice along the axes that it shortens or reverses."""
    parts = [
        (starts[axis], END if ends[axis] == value.shape[axis] else ends[axis], place, steps[axis])
        for place, axis in enumerate(value.order)
        if (starts[axis], ends[axis], steps[axis]) != (0, value.shape[axis], 1)
    ]
    if not parts:
        return value
    constants = [np.array(column, np.int64) for column in zip(*parts, strict=True)]
    return build.add("Slice", [value], shape, order=value.order, constants=constants)


@_rule("concatenate")
def _concatenate(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    values = [_operand(build, equation, inputs, index) for index in range(len(inputs))]
    order, axis = values[0].order, equation.params["dimension"]
    parts = [build.in_order(value, order) for value in values]
    shape = _output_shape(equation)
    return build.add("Concat", parts, shape, order=order, axis=order.index(axis))


@_rule("pad")
def _pad(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    value, config = _operand(build, equation, inputs), equation.params["padding_config"]
    if any(interior for _, _, interior in config) or not isinstance(inputs[1], np.ndarray):
        raise ConversionError("a padding between pixels")
    pads = np.array([config[axis][side] for side in (0, 1) for axis in value.order], np.int64)
    shape = _output_shape(equation)
    return build.add("Pad", [value], shape, order=value.order, constants=[pads, inputs[1]])


@_rule("select_n")
def _select(build: Builder, equation: Any, inputs: Sequence[Value]) -> Value:
    if len(inputs) != 3 or equation.invars[0].aval.dtype != np.bool_:
        raise ConversionError("a choice between more than two values")
    condition, if_false, if_true = inputs
    return build.elementwise("Where", [condition, if_true, if_false])


@_rule("integer_pow")
def _integer_power(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    return build.elementwise("Pow", [inputs[0], np.array(equation.params["y"], np.float32)])


@_rule("square")
def _square(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    return build.elementwise("Mul", [inputs[0], inputs[0]])


@_rule("rsqrt")
def _rsqrt(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    return build.elementwise("Reciprocal", [build.elementwise("Sqrt", inputs)])


@_rule("expm1")
def _expm1(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    return build.elementwise("Sub", [build.elementwise("Exp", inputs), np.array(1, np.float32)])


@_rule("log1p")
def _log1p(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    return build.elementwise(
        "Log", [build.elementwise("Add", [inputs[0], np.array(1, np.float32)])]
    )


@_rule("clamp")
def _clamp(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    low, value, high = inputs
    return build.elementwise("Min", [build.elementwise("Max", [value, low]), high])


@_rule("ne")
def _not_equal(build: Builder, equation: Any, inputs: Sequence[Value]) -> Tensor:
    return build.elementwise("Not", [build.elementwise("Equal", inputs)])
