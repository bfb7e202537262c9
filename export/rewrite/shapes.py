"""Shapes and integer shape tensors of a graph as polynomials over its dimension names.

An exporter leaves dimensions of intermediate values unknown (opset 18 `scaled_dot_product_attention`) and computes
others by long detours (`batch*seq // batch`); what is needed of them here is whether two are the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.rewrite.operators import (
    ARITHMETIC,
    BOOLEAN,
    ELEMENTWISE,
    KEEPS_TYPE,
    LIKE_FIRST,
    SCALAR,
    Dims,
    axes_of,
    broadcast,
    constant_array,
    sliced,
    with_axes,
)
from export.rewrite.poly import Poly, parse, product

_LONGEST_VECTOR = 16  # a shape vector is short; anything longer is data


class Shapes:
    """Answers about the values of one graph; answers are cached, so the graph must not change meanwhile."""

    def __init__(self) -> None:
        self._shapes: dict[ir.Value, Dims | None] = {}
        self._vectors: dict[ir.Value, Dims | None] = {}

    def shape(self, value: ir.Value) -> Dims | None:
        """The dimensions; one that is not known is a symbol of its own. None where not even the rank is known."""
        if value not in self._shapes:
            self._shapes[value] = None  # a malformed cyclic graph ends here
            self._shapes[value] = self._shape(value)
        return self._shapes[value]

    def rank(self, value: ir.Value) -> int | None:
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The element type, followed through operators that keep it where the graph does not state it."""
        node = value.producer()
        if value.dtype is not None or node is None or node.domain != "":
            return value.dtype
        if node.op_type == "Constant":
            array = constant_array(value)
            return None if array is None else ir.DataType.from_numpy(array.dtype)
        if node.op_type in BOOLEAN:
            return ir.DataType.BOOL
        if node.op_type == "Cast":
            return ir.DataType(node.attributes.get_int("to", 0))
        position = {"Where": 1}.get(node.op_type, 0)
        source = node.inputs[position] if position < len(node.inputs) else None
        return self.dtype(source) if source is not None and node.op_type in KEEPS_TYPE else None

    def vector(self, value: ir.Value | None) -> Dims | None:
        """The elements of an integer scalar or short 1-D tensor that depends on constants and sizes only."""
        if value is None:
            return None
        if value not in self._vectors:
            self._vectors[value] = None
            self._vectors[value] = self._vector(value)
        return self._vectors[value]

    def integers(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Like `vector`, but only where every element is a number."""
        elements = self.vector(value)
        numbers = [element.constant for element in elements or ()]
        known = tuple(number for number in numbers if number is not None)
        return known if elements is not None and len(known) == len(numbers) else None

    def scalar(self, value: ir.Value | None) -> float | None:
        """The number held by a one-element tensor that depends on constants and fixed sizes only."""
        if value is None:
            return None
        array = constant_array(value)
        if array is not None:
            return float(array.reshape(-1)[0]) if array.size == 1 else None
        numbers = self.integers(value)
        if numbers is not None:
            return float(numbers[0]) if len(numbers) == 1 else None
        node = value.producer()
        if node is None or node.op_type not in SCALAR:
            return None
        operands = [self.scalar(operand) for operand in node.inputs]
        if any(operand is None for operand in operands):
            return None
        try:
            return float(SCALAR[node.op_type](*operands))
        except (ArithmeticError, ValueError):
            return None

    def _shape(self, value: ir.Value) -> Dims | None:
        computed = self._computed_shape(value)
        if value.shape is None:
            return computed
        if computed is None or len(computed) != len(value.shape):
            computed = tuple(Poly.symbol(f"?{value.name}.{axis}") for axis in range(len(value.shape)))
        declared = (dim if isinstance(dim, int) else dim.value for dim in value.shape)
        return tuple(
            Poly.of(dim) if isinstance(dim, int) else found if _says_less(dim, found) else parse(str(dim))
            for dim, found in zip(declared, computed, strict=True)
        )

    def _computed_shape(self, value: ir.Value) -> Dims | None:
        node = value.producer()
        array = constant_array(value) if node is None or node.op_type == "Constant" else None
        if array is not None:
            return tuple(Poly.of(size) for size in array.shape)
        if node is None or node.domain != "":
            return None
        if node.op_type == "Reshape":
            return self._reshaped(node)
        shapes = [self.shape(operand) for operand in node.inputs if operand is not None]
        if not shapes or any(shape is None for shape in shapes[:1]):
            return None
        first = shapes[0]
        assert first is not None
        if node.op_type == "Shape":
            elements = self.vector(value)
            return None if elements is None else (Poly.of(len(elements)),)
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm", None) or range(len(first))[::-1]
            return tuple(first[axis] for axis in perm)
        if node.op_type in ("Unsqueeze", "Squeeze"):
            axes = axes_of(node, self)
            if len(node.inputs) == 1 and "axes" not in node.attributes and all(dim.constant for dim in first):
                axes = tuple(axis for axis, dim in enumerate(first) if dim.constant == 1)
            return None if axes is None else with_axes(first, axes, node.op_type == "Unsqueeze")
        if node.op_type == "Range":
            ends = [self.vector(operand) for operand in node.inputs]
            if None not in ends and ends[2] == (Poly.of(1),) and ends[0] and ends[1]:
                return (ends[1][0] - ends[0][0],)
            return (Poly.symbol(f"?{value.name}.0"),)
        if node.op_type == "Slice":
            return self._sliced_shape(node, first)
        if node.op_type == "ConstantOfShape":
            return self.vector(node.inputs[0])
        if node.op_type == "Expand":
            target = self.vector(node.inputs[1])
            return None if target is None else broadcast(first, target, value)
        if node.op_type == "Tile":
            times = self.vector(node.inputs[1])
            return None if times is None else tuple(a * b for a, b in zip(first, times, strict=True))
        if any(shape is None for shape in shapes):
            return None
        known = [shape for shape in shapes if shape is not None]
        if node.op_type == "Gather":
            axis = node.attributes.get_int("axis", 0) % len(first)
            return (*first[:axis], *known[1], *first[axis + 1 :])
        if node.op_type == "GatherND" and len(known) == 2 and known[1][-1].constant == len(first):
            return known[1][:-1] if not node.attributes.get_int("batch_dims", 0) else None
        if node.op_type == "MatMul" and min(map(len, known)) >= 2:
            batch = broadcast(known[0][:-2], known[1][:-2], value)
            return (*batch, known[0][-2], known[1][-1])
        if node.op_type == "Concat":
            axis = node.attributes.get_int("axis", 0)
            joined = sum((shape[axis] for shape in known[1:]), known[0][axis])
            return tuple(joined if at == axis % len(first) else dim for at, dim in enumerate(first))
        if node.op_type in (*ELEMENTWISE, *LIKE_FIRST):
            result = first if node.op_type in LIKE_FIRST else ()
            for shape in known if not result else ():
                result = broadcast(result, shape, value)
            return result
        return None

    def _sliced_shape(self, node: ir.Node, source: Dims) -> Dims:
        """The rank is kept; a sliced axis has a length only where no bound can be beyond its end."""
        axes = self.integers(node.inputs[3]) if len(node.inputs) > 3 else None
        steps = self.integers(node.inputs[4]) if len(node.inputs) > 4 else None
        starts, ends = (self.integers(operand) for operand in node.inputs[1:3])
        dims = list(source)
        for position, at in enumerate(tuple(range(len(source))) if axes is None else axes):
            axis = at % len(source)
            dims[axis] = Poly.symbol(f"?{node.outputs[0].name}.{axis}")
            if starts is None or ends is None or starts[position] < 0 or (steps and steps[position] != 1):
                continue
            cut = -ends[position] if ends[position] < 0 else 0 if ends[position] > np.iinfo(np.int32).max else None
            if cut is not None and (source[axis] - starts[position] - cut).is_nonnegative:
                dims[axis] = source[axis] - starts[position] - cut
        return tuple(dims)

    def _reshaped(self, node: ir.Node) -> Dims | None:
        source = self.shape(node.inputs[0]) if node.inputs[0] is not None else None
        target = self.vector(node.inputs[1])
        if target is None:
            return None
        copies = not node.attributes.get_int("allowzero", 0)
        dims = [
            source[axis] if copies and dim.constant == 0 and source is not None and axis < len(source) else dim
            for axis, dim in enumerate(target)
        ]
        for axis, dim in enumerate(dims):
            if dim.constant == -1:
                rest = product(other for at, other in enumerate(dims) if at != axis)
                quotient = None if source is None else product(source).divided_by(rest)
                dims[axis] = Poly.symbol(f"?{node.outputs[0].name}.{axis}") if quotient is None else quotient
        return tuple(dims)

    def _vector(self, value: ir.Value) -> Dims | None:
        array = constant_array(value)
        if array is not None:
            if array.dtype.kind not in "iu" or array.ndim > 1 or array.size > _LONGEST_VECTOR:
                return None
            return tuple(Poly.of(int(element)) for element in array.reshape(-1))
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type == "Shape":
            shape = self.shape(node.inputs[0]) if node.inputs[0] is not None else None
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
            return None if shape is None else shape[start:end]
        if node.op_type in ("Squeeze", "Unsqueeze", "Identity", "Reshape"):
            elements = self.vector(node.inputs[0])
            return elements if elements is not None and (len(elements) == 1 or node.op_type == "Identity") else None
        if node.op_type == "Cast":
            whole = ir.DataType(node.attributes.get_int("to", 0)) in (ir.DataType.INT64, ir.DataType.INT32)
            return self.vector(node.inputs[0]) if whole else None
        operands = [self.vector(operand) for operand in node.inputs]
        if any(operand is None for operand in operands):
            return None
        known = [operand for operand in operands if operand is not None]
        match node.op_type:
            case "Concat":
                return tuple(element for operand in known for element in operand)
            case "Gather":
                picks = [index.constant for index in known[1]]
                if all(pick is not None and -len(known[0]) <= pick < len(known[0]) for pick in picks):
                    return tuple(known[0][pick] for pick in picks if pick is not None)
            case "Slice":
                return sliced(known)
            case "Add" | "Sub" | "Mul" | "Div" if len({len(operand) for operand in known}) == 1:
                results = [ARITHMETIC[node.op_type](a, b) for a, b in zip(*known, strict=True)]
                found = tuple(result for result in results if result is not None)
                return found if len(found) == len(results) else None
        return None


def _says_less(declared: str | None, found: Poly) -> bool:
    """Whether a declared dimension (unnamed, or named by shape inference) says less than the computed one."""
    return declared is None or declared.startswith("unk__") or found.constant is not None
