"""Adds operators to a graph while it tracks the order of axes and what is yet to be broadcast.

Axes are reordered as late as possible: JAX's layers here have the channels last, ONNX convolves
[batch, channels, height, width], and the layers in between take any order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from histo_jax.export.graph import Graph

# The number of images with which functions are traced, in place of any number: a prime, larger than
# the sizes of layers, so that it is found in the shapes.
BATCH = 7919


class ConversionError(Exception):
    """An operation has no equivalent.

    Args:
        operation: what it is.

    Attributes:
        layer: path of the layer that contains it; '' = not known.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(operation)
        self.layer = ""


class Tensor(NamedTuple):
    """A value of the graph.

    Attributes:
        name: in the graph.
        order: `order[k]` is the axis in JAX of axis `k` in the graph.
        shape: in JAX's order; 1 along axes that are yet to be broadcast.
    """

    name: str
    order: tuple[int, ...]
    shape: tuple[int, ...]


# An array is a constant; like a tensor, it may yet have to be broadcast.
Value = Tensor | np.ndarray


def batches(shape: Sequence[int]) -> int:
    """Returns the number of axes whose size depends on the number of images."""
    return sum(size > 0 and size % BATCH == 0 for size in shape)


class Builder:
    """Adds operators to its `graph`."""

    def __init__(self) -> None:
        self.graph = Graph()

    def add(
        self,
        op: str,
        inputs: Sequence[Tensor],
        shape: Sequence[int],
        *,
        order: Sequence[int] | None = None,
        constants: Sequence[Any] = (),
        **attributes: Any,
    ) -> Tensor:
        """Adds an operator.

        Args:
            op: its name.
            inputs: its tensors.
            shape: of its output, in JAX's order.
            order: of its output's axes; None = as in JAX.
            constants: arrays that follow the inputs.
            attributes: of the operator.
        """
        names = [tensor.name for tensor in inputs] + [self.graph.constant(c) for c in constants]
        order = range(len(shape)) if order is None else order
        return Tensor(self.graph.add(op, names, **attributes), tuple(order), tuple(shape))

    def elementwise(self, op: str, inputs: Sequence[Value]) -> Tensor:
        """Adds an operator that computes each element by itself."""
        order = next(value.order for value in inputs if isinstance(value, Tensor))
        shape = np.broadcast_shapes(*(value.shape for value in inputs))
        if op == "Max" and any(isinstance(v, np.ndarray) and not v.any() for v in inputs):
            op, inputs = "Relu", [value for value in inputs if isinstance(value, Tensor)]
        return self.add(op, [self.in_order(value, order) for value in inputs], shape, order=order)

    def in_order(self, value: Value, order: Sequence[int] | None = None) -> Tensor:
        """Returns a value with its axes in this order; None = as in JAX."""
        order = tuple(range(len(value.shape)) if order is None else order)
        if isinstance(value, np.ndarray):
            # A scalar has no axes.
            array = value.transpose(order) if value.ndim else value
            return Tensor(self.graph.constant(array), order, value.shape)
        if value.order == order:
            return value
        axes = [value.order.index(axis) for axis in order]
        return self.add("Transpose", [value], value.shape, order=order, perm=axes)

    def expanded(self, value: Value, shape: Sequence[int]) -> Tensor:
        """Returns a value as a tensor, broadcast to this shape.

        Raises:
            ConversionError: it is a constant, to be repeated for each image.
        """
        shape = tuple(shape)
        if isinstance(value, np.ndarray):
            value = self.in_order(value.reshape(value.shape or (1,) * len(shape)))
        if value.shape == shape:
            return value
        # In ONNX a size of 1 keeps an axis as it is.
        sizes = [1 if old == new else new for old, new in zip(value.shape, shape, strict=True)]
        if batches(sizes):
            raise ConversionError("a constant that is repeated for each image")
        target = np.array([sizes[axis] for axis in value.order], np.int64)
        return self.add("Expand", [value], shape, order=value.order, constants=[target])

    def reshape(self, value: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns a tensor with another shape.

        Raises:
            ConversionError: more than one of its axes depends on the number of images.
        """
        if batches(shape) > 1:
            raise ConversionError("a shape with several axes that depend on the number of images")
        sizes = np.array([-1 if batches([size]) else size for size in shape], np.int64)
        return self.add("Reshape", [self.in_order(value)], shape, constants=[sizes])
