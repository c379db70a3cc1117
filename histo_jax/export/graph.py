"""A graph of ONNX operators while it is built, and its simplification.

Nodes have one output each and are kept in the order of their computation.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

# The end of a slice that reaches the end of its axis.
END = 2**63 - 1


@dataclasses.dataclass
class Node:
    """An operator of ONNX.

    Attributes:
        op: name of the operator.
        inputs: names of values or constants.
        output: name of its value.
        attributes: by name.
    """

    op: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any]


class Graph:
    """Nodes and constants.

    Attributes:
        nodes: in the order of their computation.
        constants: by name; equal ones have one name.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self._names: dict[Any, str] = {}
        self._count = 0

    def add(
        self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any
    ) -> str:
        """Appends a node and returns the name of its value."""
        if output is None:
            output, self._count = f"{op.lower()}_{self._count}", self._count + 1
        self.nodes.append(Node(op, list(inputs), output, attributes))
        return output

    def constant(self, value: Any) -> str:
        """Returns the name of a constant."""
        # `ascontiguousarray` would make a scalar a vector.
        value = np.array(value, order="C")
        key = value.dtype.str, value.shape, value.tobytes()
        if key not in self._names:
            self._names[key] = f"constant_{len(self._names)}"
            self.constants[self._names[key]] = value
        return self._names[key]

    def simplify(self, outputs: Sequence[str]) -> None:
        """Folds scales and biases into convolutions, joins maxima, and drops what is not used.

        Args:
            outputs: names of the values that are kept.
        """
        while self._fold_affine() or self._join_maxima():
            pass
        used, kept = set(outputs), []
        for node in reversed(self.nodes):
            if node.output in used:
                used.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {name: self.constants[name] for name in self.constants if name in used}

    def _users(self) -> collections.Counter[str]:
        return collections.Counter(name for node in self.nodes for name in node.inputs)

    def _fold_affine(self) -> bool:
        """Folds the products and sums that follow a convolution, such as BatchNorm, into it."""
        users, convolutions, has_changed = self._users(), {}, False
        for node in list(self.nodes):
            if node.op == "Conv" and node.inputs[1] in self.constants:
                convolutions[node.output] = node
            factor_and_bias = self._affine(node, convolutions)
            if factor_and_bias is None or users[factor_and_bias[0]] > 1:
                continue
            source, factor, bias = factor_and_bias
            convolution = convolutions.pop(source)
            self._scale(convolution, factor, bias)
            # It computes the value of the node that it replaces.
            self.nodes.remove(convolution)
            self.nodes[self.nodes.index(node)] = convolution
            convolution.output = node.output
            convolutions[node.output] = convolution
            has_changed = True
        return has_changed

    def _affine(
        self, node: Node, convolutions: dict[str, Node]
    ) -> tuple[str, np.ndarray, np.ndarray] | None:
        """Returns a node's input, factor and bias where it scales or shifts a convolution."""
        if node.op not in ("Mul", "Div", "Add", "Sub"):
            return None
        first, second = node.inputs
        if node.op in ("Mul", "Add") and first in self.constants:
            first, second = second, first
        if first not in convolutions or second not in self.constants:
            return None
        value, kernel = self.constants[second], self.constants[convolutions[first].inputs[1]]
        channels = kernel.shape[0]
        if value.size != 1 and value.shape != (1, channels, *[1] * (kernel.ndim - 2)):
            return None
        value = np.broadcast_to(value.reshape(-1).astype(np.float64), channels)
        one, zero = np.ones(channels), np.zeros(channels)
        if node.op in ("Add", "Sub"):
            return first, one, value if node.op == "Add" else -value
        return first, value if node.op == "Mul" else 1 / value, zero

    def _scale(self, convolution: Node, factor: np.ndarray, bias: np.ndarray) -> None:
        """Changes a convolution to its value times `factor` plus `bias`, of each channel."""
        source, kernel_name, *old = convolution.inputs
        kernel = self.constants[kernel_name]
        old_bias = self.constants[old[0]] if old else np.zeros(len(kernel))
        scaled = kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))
        new = [scaled, old_bias * factor + bias]
        convolution.inputs = [source, *(self.constant(v.astype(kernel.dtype)) for v in new)]

    def _join_maxima(self) -> bool:
        """Replaces the maximum of all strided slices of an image by one max-pooling."""
        users = self._users()
        producers = {node.output: node for node in self.nodes}

        def slices(name: str, is_root: bool = False) -> list[Node | None]:
            node = producers.get(name)
            if node and node.op == "Max" and (is_root or users[name] == 1):
                return [leaf for each in node.inputs for leaf in slices(each)]
            return [node if node and node.op == "Slice" else None]

        for node in self.nodes:
            leaves = slices(node.output, is_root=True) if node.op == "Max" else []
            stride = round(len(leaves) ** 0.5)
            if stride > 1 and self._starts(leaves, stride) == {
                (row, column) for row in range(stride) for column in range(stride)
            }:
                assert leaves[0]
                node.op, node.inputs = "MaxPool", leaves[0].inputs[:1]
                node.attributes = {"kernel_shape": [stride] * 2, "strides": [stride] * 2}
                return True
        return False

    def _starts(self, leaves: Sequence[Node | None], stride: int) -> set[tuple[int, ...]]:
        """Returns the starts of slices along height and width, if all are of one image."""
        starts = set()
        for leaf in leaves:
            if leaf is None or leaf.inputs[0] != leaves[0].inputs[0]:  # type: ignore[union-attr]
                return set()
            start, *rest = (self.constants[name].tolist() for name in leaf.inputs[1:])
            if rest != [[END] * 2, [2, 3], [stride] * 2]:
                return set()
            starts.add(tuple(start))
        return starts if len(starts) == len(leaves) else set()
