"""What single ONNX operators do to shapes, types and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from export.rewrite.poly import Poly

Dims = tuple[Poly, ...]

ELEMENTWISE = (
    "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "Where", "And", "Or", "Not", "Neg", "Sqrt", "Tanh", "Equal",
    "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Cast", "Identity", "Softmax", "IsNaN",
)  # fmt: skip
LIKE_FIRST = ("Dropout", "RotaryEmbedding", "Clip", "Trilu", "CumSum")
"""The output has the shape of the first input, whatever the others are."""

KEEPS_TYPE = (
    "Add", "Sub", "Mul", "Div", "Where", "Neg", "Identity", "Softmax", "MatMul", "Gemm", "Einsum", "Reshape",
    "Transpose", "Unsqueeze", "Squeeze", "Expand", "Tile", "Concat", "Slice", "Split", "Gather", "LayerNormalization",
    "RMSNormalization", "Attention", *LIKE_FIRST,
)  # fmt: skip
BOOLEAN = ("And", "Or", "Not", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN")


class IntegerTensors(Protocol):
    """Whoever knows the elements of integer tensors."""

    def integers(self, value: ir.Value | None) -> tuple[int, ...] | None: ...


def broadcast(left: Sequence[Poly], right: Sequence[Poly], owner: ir.Value) -> Dims:
    """The broadcast shape of two; a dimension that cannot be told is a symbol that belongs to `owner`."""
    rank = max(len(left), len(right))
    one = Poly.of(1)
    padded = zip([one] * (rank - len(left)) + list(left), [one] * (rank - len(right)) + list(right), strict=True)
    result = []
    for axis, (a, b) in enumerate(padded):
        if a == b or b == one:
            result.append(a)
        elif a == one or (b.constant is not None and a.constant is None):
            result.append(b)
        else:
            result.append(a if a.constant is not None else Poly.symbol(f"?{owner.name}.{axis}"))
    return tuple(result)


def constant_array(value: ir.Value) -> np.ndarray | None:
    """The NumPy array of an initializer that no caller can override, or of a Constant node; else None."""
    if value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain != "" or len(node.attributes) != 1:
        return None
    ((kind, attribute),) = node.attributes.items()
    if kind == "value":
        return attribute.as_tensor().numpy()
    dtype = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    return np.asarray(attribute.value, dtype=dtype[kind]) if kind in dtype else None


def axes_of(node: ir.Node, shapes: IntegerTensors) -> tuple[int, ...] | None:
    """The `axes` of Squeeze, Unsqueeze and reductions, input or attribute."""
    if "axes" in node.attributes:
        return tuple(node.attributes["axes"].as_ints())
    return shapes.integers(node.inputs[1]) if len(node.inputs) > 1 else None


def with_axes(shape: Dims, axes: Sequence[int], insert: bool) -> Dims:
    if not insert:
        gone = {axis % len(shape) for axis in axes}
        return tuple(dim for axis, dim in enumerate(shape) if axis not in gone)
    rank = len(shape) + len(axes)
    new = {axis % rank for axis in axes}
    old = iter(shape)
    return tuple(Poly.of(1) if axis in new else next(old) for axis in range(rank))


def sliced(operands: Sequence[Dims]) -> Dims | None:
    numbers = [[element.constant for element in operand] for operand in operands[1:]]
    if any(len(operand) != 1 or operand[0] is None for operand in numbers):
        return None
    start, end, *rest = (operand[0] for operand in numbers)
    step = rest[1] if len(rest) > 1 else 1
    return operands[0][start:end:step]


ARITHMETIC: dict[str, Callable[[Poly, Poly], Poly | None]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a.divided_by(b),
}

SCALAR: dict[str, Callable[..., float]] = {
    "Sqrt": math.sqrt,
    "Reciprocal": lambda x: 1 / x,
    "Neg": lambda x: -x,
    "Cast": float,
    "Identity": float,
    "Squeeze": lambda x, *_: x,
    "Unsqueeze": lambda x, *_: x,
    "CastLike": lambda x, _: x,
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
    "Pow": lambda a, b: a**b,
}
