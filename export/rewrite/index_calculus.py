"""Evaluate the subgraph of a mask as a function of its indices, for every size at once.

Exporters spell a causal mask in many ways (Range and LessOrEqual; Trilu of ones; GatherND through index grids; a
cumulative sum that is always zero; a stored triangular buffer that is sliced). Each of those operators has an exact
meaning on expressions over indices; evaluating the subgraph symbolically proves what the mask is, where running it at a
few sizes would take a window of 4096 for a causal mask.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from export.rewrite.expression import (
    Choice,
    Expression,
    NotUnderstoodError,
    Number,
    Truth,
    arithmetic,
    at_least_zero,
    both,
    choose,
    combine,
    comparison,
    either,
    index,
    negate,
    substitute,
)
from export.rewrite.operators import Dims, axes_of, constant_array
from export.rewrite.poly import Poly
from export.rewrite.shapes import Shapes

_EXACT_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)  # hold every index below 2^24; half precision does not
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_MAXIMUM_ELEMENTS = 1 << 26


class Grid(NamedTuple):
    """A tensor: its dimensions, and its element at index (#0, #1, ...). Axes of size 1 do not occur in the element."""

    shape: Dims
    element: Expression


class IndexCalculus:
    """Evaluates values of one graph; raises `NotUnderstoodError` for whatever depends on data."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self._known: dict[ir.Value, Grid | NotUnderstoodError] = {}

    def grid(self, value: ir.Value | None) -> Grid:
        if value is None:
            raise NotUnderstoodError("an absent input")
        if value not in self._known:
            try:
                self._known[value] = self._evaluate(value)
            except NotUnderstoodError as error:
                self._known[value] = error
        found = self._known[value]
        if isinstance(found, NotUnderstoodError):
            raise found
        return found

    def _evaluate(self, value: ir.Value) -> Grid:
        shape = self.shapes.shape(value)
        if shape is None:
            raise NotUnderstoodError(f"rank of {value.name}")
        array = constant_array(value)
        if array is not None:
            if array.size > _MAXIMUM_ELEMENTS:
                raise NotUnderstoodError(f"{value.name} is too large")
            return _grid(shape, describe_array(array))
        elements = self.shapes.vector(value)
        if elements is not None:
            return _grid(shape, _pieces([(element, Poly.of(1)) for element in elements], 0))
        node = value.producer()
        handler = None if node is None or node.domain != "" else getattr(self, f"_{node.op_type.lower()}", None)
        if node is None or handler is None:
            raise NotUnderstoodError(f"{value.name} depends on data")
        return _grid(shape, handler(node, shape))

    def _aligned(self, value: ir.Value | None, rank: int) -> Expression:
        """The element of a value broadcast to `rank` axes."""
        grid = self.grid(value)
        return shift(grid.element, len(grid.shape), rank - len(grid.shape))

    def _binary(self, node: ir.Node, shape: Dims) -> Expression:
        make = comparison if node.op_type not in ("Add", "Sub", "Mul") else arithmetic
        left, right = (self._aligned(operand, len(shape)) for operand in node.inputs)
        return combine(make(node.op_type), left, right)

    _add = _sub = _mul = _equal = _less = _lessorequal = _greater = _greaterorequal = _binary

    def _and(self, node: ir.Node, shape: Dims) -> Expression:
        return both(*(self._aligned(operand, len(shape)) for operand in node.inputs))

    def _or(self, node: ir.Node, shape: Dims) -> Expression:
        return either(*(self._aligned(operand, len(shape)) for operand in node.inputs))

    def _not(self, node: ir.Node, shape: Dims) -> Expression:
        return negate(self.grid(node.inputs[0]).element)

    def _where(self, node: ir.Node, shape: Dims) -> Expression:
        return choose(*(self._aligned(operand, len(shape)) for operand in node.inputs))

    def _identity(self, node: ir.Node, shape: Dims) -> Expression:
        return self.grid(node.inputs[0]).element

    def _cast(self, node: ir.Node, shape: Dims) -> Expression:
        target = ir.DataType(node.attributes.get_int("to", 0))
        return _cast(self.grid(node.inputs[0]).element, target)

    def _range(self, node: ir.Node, shape: Dims) -> Expression:
        start, delta = (self.shapes.vector(node.inputs[at]) for at in (0, 2))
        if start is None or delta is None:
            raise NotUnderstoodError("a Range that depends on data")
        return start[0] + index(0) * delta[0]

    def _constantofshape(self, node: ir.Node, shape: Dims) -> Expression:
        value = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
        return describe_array(value)

    def _expand(self, node: ir.Node, shape: Dims) -> Expression:
        return self._aligned(node.inputs[0], len(shape))

    def _unsqueeze(self, node: ir.Node, shape: Dims) -> Expression:
        return self._reshape(node, shape)

    _squeeze = _unsqueeze

    def _reshape(self, node: ir.Node, shape: Dims) -> Expression:
        """Only axes of size 1 may come and go: then the other axes keep their indices."""
        source = self.grid(node.inputs[0])
        if node.op_type == "Reshape":
            old = [axis for axis, dim in enumerate(source.shape) if dim.constant != 1]
            new = [axis for axis, dim in enumerate(shape) if dim.constant != 1]
            if [source.shape[axis] for axis in old] != [shape[axis] for axis in new]:
                raise NotUnderstoodError("a Reshape that regroups indices")
        else:
            axes = axes_of(node, self.shapes)
            if axes is None and node.op_type == "Squeeze":
                axes = tuple(axis for axis, dim in enumerate(source.shape) if dim.constant == 1)
            if axes is None:
                raise NotUnderstoodError(f"axes of {node.op_type}")
            longer = max(len(source.shape), len(shape))
            kept = [axis for axis in range(longer) if axis not in {axis % longer for axis in axes}]
            short = list(range(len(kept)))
            old, new = (short, kept) if node.op_type == "Unsqueeze" else (kept, short)
        return substitute(source.element, {f"#{a}": index(b) for a, b in zip(old, new, strict=True)})

    def _transpose(self, node: ir.Node, shape: Dims) -> Expression:
        perm = node.attributes.get_ints("perm", None) or range(len(shape))[::-1]
        return substitute(self.grid(node.inputs[0]).element, {f"#{old}": index(new) for new, old in enumerate(perm)})

    def _slice(self, node: ir.Node, shape: Dims) -> Expression:
        source = self.grid(node.inputs[0])
        starts, ends = (self.shapes.vector(operand) for operand in node.inputs[1:3])
        axes = self.shapes.integers(node.inputs[3]) if len(node.inputs) > 3 else tuple(range(len(starts or ())))
        steps = self.shapes.integers(node.inputs[4]) if len(node.inputs) > 4 else (1,) * len(starts or ())
        if starts is None or ends is None or axes is None or steps is None or any(step <= 0 for step in steps):
            raise NotUnderstoodError("a Slice that depends on data")
        moved = {}
        for start, axis, step in zip(starts, axes, steps, strict=True):
            at = axis % len(shape)
            if start.constant is not None and start.constant < 0:
                start = source.shape[at] + start
            if not start.is_nonnegative:  # it might count from the end
                raise NotUnderstoodError(f"a Slice from {start}")
            moved[f"#{at}"] = start + index(at) * step
        return substitute(source.element, moved)

    def _concat(self, node: ir.Node, shape: Dims) -> Expression:
        axis = node.attributes.get_int("axis", 0) % len(shape)
        grids = [self.grid(operand) for operand in node.inputs]
        return _pieces([(grid.element, grid.shape[axis]) for grid in grids], axis)

    def _gather(self, node: ir.Node, shape: Dims) -> Expression:
        data, picks = (self.grid(operand) for operand in node.inputs)
        axis = node.attributes.get_int("axis", 0) % len(data.shape)
        added = len(picks.shape)
        pick = _index_into(shift(picks.element, added, axis))
        moved = {f"#{old}": index(old + added - 1) for old in range(axis + 1, len(data.shape))}
        return substitute(data.element, {**moved, f"#{axis}": pick})

    def _gathernd(self, node: ir.Node, shape: Dims) -> Expression:
        data, picks = (self.grid(operand) for operand in node.inputs)
        if node.attributes.get_int("batch_dims", 0) or picks.shape[-1].constant != len(data.shape):
            raise NotUnderstoodError("a GatherND of slices")
        last = len(picks.shape) - 1
        moved = {
            f"#{axis}": _index_into(substitute(picks.element, {f"#{last}": Poly.of(axis)}))
            for axis in range(len(data.shape))
        }
        return substitute(data.element, moved)

    def _cumsum(self, node: ir.Node, shape: Dims) -> Expression:
        element = self.grid(node.inputs[0]).element
        if isinstance(element, Poly) and element == Poly():
            return element
        raise NotUnderstoodError("a sum over data")

    def _trilu(self, node: ir.Node, shape: Dims) -> Expression:
        source = self.grid(node.inputs[0]).element
        offset = self.shapes.vector(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else (Poly(),)
        if offset is None:
            raise NotUnderstoodError("a Trilu whose diagonal depends on data")
        distance = index(len(shape) - 1) - index(len(shape) - 2) - offset[0]
        inside = at_least_zero(distance if node.attributes.get_int("upper", 1) else -distance)
        zero: Expression = Truth(False) if node.outputs[0].dtype == ir.DataType.BOOL else Poly()
        if node.outputs[0].dtype is None or node.outputs[0].dtype.is_floating_point():
            zero = Number(0.0) if not isinstance(source, Truth) else Truth(False)
        return choose(inside, source, zero)


def shift(element: Expression, rank: int, by: int) -> Expression:
    """Move every axis `by` places to the right."""
    return substitute(element, {f"#{axis}": index(axis + by) for axis in range(rank)}) if by else element


def describe_array(array: np.ndarray) -> Expression:
    """A constant as a function of its indices: one value, an arithmetic progression, or a band around a diagonal."""
    if array.size == 0:
        raise NotUnderstoodError("an empty constant")
    first = array.reshape(-1)[0]
    if (array == first).all():
        if array.dtype.kind == "b":
            return Truth(bool(first))
        return Poly.of(int(first)) if array.dtype.kind in "iu" else Number(float(first))
    if array.dtype.kind in "iu":
        return _progression(array)
    if array.dtype.kind == "b":
        return _band(array)
    low, high = array.min(), array.max()
    if not ((array == low) | (array == high)).all():
        raise NotUnderstoodError("a constant of many values")
    return choose(_band(array == high), Number(float(high)), Number(float(low)))


def _progression(array: np.ndarray) -> Expression:
    origin = int(array[(0,) * array.ndim])
    result, expected = Poly.of(origin), np.full(array.shape, origin)
    for axis, size in enumerate(array.shape):
        if size > 1:
            step = int(array[tuple(int(at == axis) for at in range(array.ndim))]) - origin
            result += index(axis) * step
            expected = expected + step * np.arange(size).reshape([-1 if at == axis else 1 for at in range(array.ndim)])
    if not (array == expected).all():
        raise NotUnderstoodError("an integer constant that is no progression")
    return result


def _band(array: np.ndarray) -> Expression:
    """True exactly where low <= column - row <= high, for the last two axes; the others must repeat it."""
    if array.ndim < 2 or not (array == array[(slice(0, 1),) * (array.ndim - 2)]).all():
        raise NotUnderstoodError("a Boolean constant that is no band")
    rows, columns = array.shape[-2:]
    matrix = array[(0,) * (array.ndim - 2)]
    distance = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    low, high = int(distance[matrix].min()), int(distance[matrix].max())
    if not (matrix == ((distance >= low) & (distance <= high))).all():
        if matrix.all(axis=None) or not matrix.any():
            raise NotUnderstoodError("a constant mask")
        complement = ~matrix
        low, high = int(distance[complement].min()), int(distance[complement].max())
        if not (complement == ((distance >= low) & (distance <= high))).all():
            raise NotUnderstoodError("a Boolean constant that is no band")
        return negate(_between(low, high, rows, columns, array.ndim))
    return _between(low, high, rows, columns, array.ndim)


def _between(low: int, high: int, rows: int, columns: int, rank: int) -> Expression:
    distance = index(rank - 1) - index(rank - 2)
    upper = Truth(True) if high >= columns - 1 else at_least_zero(-distance + high)
    lower = Truth(True) if low <= 1 - rows else at_least_zero(distance - low)
    return both(upper, lower)


def _grid(shape: Dims, element: Expression) -> Grid:
    ones = {f"#{axis}": Poly() for axis, dim in enumerate(shape) if dim.constant == 1}
    return Grid(shape, substitute(element, ones))


def _pieces(parts: list[tuple[Expression, Poly]], axis: int) -> Expression:
    """Parts laid end to end along an axis, each with its length."""
    ends, total = [], Poly()
    for _, length in parts:
        ends.append(total + length)
        total += length
    result = substitute(parts[-1][0], {f"#{axis}": index(axis) - (total - parts[-1][1])})
    for (element, length), end in zip(parts[-2::-1], ends[-2::-1], strict=True):
        here = substitute(element, {f"#{axis}": index(axis) - (end - length)})
        result = choose(at_least_zero(end - 1 - index(axis)), here, result)
    return result


def _index_into(element: Expression) -> Poly:
    """An index that certainly counts from the front (negative ones would count from the back)."""
    if not isinstance(element, Poly) or not element.is_nonnegative:
        raise NotUnderstoodError("an index that may be negative")
    return element


def _cast(element: Expression, target: ir.DataType) -> Expression:
    def convert(value: Expression) -> Expression:
        if target == ir.DataType.BOOL:
            if isinstance(value, Poly):
                return negate(comparison("Equal")(value, Poly()))
            return Truth(value.value != 0) if isinstance(value, Number) else value
        if isinstance(value, Truth):
            return Poly.of(int(value.value))
        if isinstance(value, Number) and target.is_floating_point():
            return value
        if isinstance(value, Poly) and (target in _INTEGERS or target in _EXACT_FLOATS or value.constant is not None):
            return value
        raise NotUnderstoodError(f"a Cast to {target.name}")

    def below(value: Expression) -> Expression:
        if isinstance(value, Choice):
            return choose(value.condition, below(value.yes), below(value.no))
        if not isinstance(value, Poly | Number | Truth) and target != ir.DataType.BOOL:
            return choose(value, Poly.of(1), Poly())  # a comparison as a number
        return convert(value)

    return below(element)
