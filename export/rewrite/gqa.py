"""Un-expansion of grouped-query attention: K and V as they were before each head was repeated.

The op takes `[B, Hk, S, D]`; exporters repeat each K/V head for its group of query heads by Unsqueeze, Expand (or
Tile) and Reshape. Only that order of repetition means "query head h uses K/V head h // group"; repeating whole blocks
of heads does not, and stays expanded.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from export.rewrite.match import producer
from export.rewrite.operators import Dims
from export.rewrite.poly import Poly
from export.rewrite.shapes import Shapes


class Unexpanded(NamedTuple):
    """A K or V before its heads were repeated `group` times."""

    value: ir.Value
    group: int


def unexpand(value: ir.Value, shapes: Shapes) -> Unexpanded:
    """`[B, Hk * group, S, D]` back to `[B, Hk, S, D]`, or the value itself with group 1."""
    kept = Unexpanded(value, 1)
    merge = producer(value, "Reshape")
    if merge is None or merge.inputs[0] is None:
        return kept
    repeated = repeated_heads(merge.inputs[0], shapes)
    merged = _merged_shape(merge, shapes)
    if repeated is None or merged is None or len(merged) != 4:
        return kept
    source = shapes.shape(repeated.value)
    assert source is not None
    wanted = (source[0], source[1] * repeated.group, *source[2:])
    if any(dim not in (size, Poly.of(-1)) for dim, size in zip(merged, wanted, strict=True)):
        return kept
    return repeated


def repeated_heads(value: ir.Value, shapes: Shapes) -> Unexpanded | None:
    """What `[B, Hk, group, S, D]` repeats along its third axis, None where it does not do just that."""
    repeat = producer(value, "Expand", "Tile")
    if repeat is None or repeat.inputs[0] is None:
        return None
    split = producer(repeat.inputs[0], "Unsqueeze", "Reshape")
    if split is None or split.inputs[0] is None:
        return None
    source, before = shapes.shape(split.inputs[0]), shapes.shape(repeat.inputs[0])
    target = shapes.vector(repeat.inputs[1])
    if source is None or before is None or target is None:
        return None
    if len(source) != 4 or len(target) != 5 or before != (*source[:2], Poly.of(1), *source[2:]):
        return None
    group = target[2].constant
    others = [(dim, size) for axis, (dim, size) in enumerate(zip(target, before, strict=True)) if axis != 2]
    if group is None or any(dim != size and dim.constant != 1 for dim, size in others):
        return None
    if repeat.op_type == "Tile" and any(dim.constant != 1 for dim, _ in others):
        return None
    return Unexpanded(split.inputs[0], group)


def _merged_shape(node: ir.Node, shapes: Shapes) -> Dims | None:
    target = shapes.vector(node.inputs[1])
    return target if target is not None and Poly() not in target else shapes.shape(node.outputs[0])
