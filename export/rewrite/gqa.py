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
    repeat = producer(merge.inputs[0], "Expand", "Tile")
    if repeat is None or repeat.inputs[0] is None:
        return kept
    split = producer(repeat.inputs[0], "Unsqueeze", "Reshape")
    if split is None or split.inputs[0] is None:
        return kept
    source, before = shapes.shape(split.inputs[0]), shapes.shape(repeat.inputs[0])
    target = shapes.vector(repeat.inputs[1])
    merged = _merged_shape(merge, shapes)
    if source is None or before is None or target is None or merged is None:
        return kept
    if len(source) != 4 or len(before) != 5 or len(target) != 5 or len(merged) != 4:
        return kept
    if before != (*source[:2], Poly.of(1), *source[2:]):
        return kept
    group = target[2].constant
    others = [(dim, size) for axis, (dim, size) in enumerate(zip(target, before, strict=True)) if axis != 2]
    if group is None or any(dim != size and dim.constant != 1 for dim, size in others):
        return kept
    heads = source[1] * group
    if merged[0] not in (source[0], Poly.of(-1)) or merged[3] not in (source[3], Poly.of(-1)):
        return kept
    if merged[1] not in (heads, Poly.of(-1)) or merged[2] not in (source[2], Poly.of(-1)):
        return kept
    return Unexpanded(split.inputs[0], group)


def _merged_shape(node: ir.Node, shapes: Shapes) -> Dims | None:
    target = shapes.vector(node.inputs[1])
    return target if target is not None and Poly() not in target else shapes.shape(node.outputs[0])
