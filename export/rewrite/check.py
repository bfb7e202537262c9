"""Check: whether a matched attention is exactly what the op computes, and with which inputs and attributes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from export.rewrite.gqa import Unexpanded, unexpand
from export.rewrite.index_calculus import IndexCalculus
from export.rewrite.masks import MaskParts, take_apart
from export.rewrite.match import AttentionMatch, Operand
from export.rewrite.operators import Dims
from export.rewrite.poly import Poly
from export.rewrite.report import RefusalError
from export.rewrite.shapes import Shapes

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass
class Plan:
    """An attention that can be rewritten, and how.

    `q_start`: None where row 0 is key `Sk - Sq` (the op's default), else the key of row 0. `group`: how often K and V
    were repeated before. `notes` are for the report.
    """

    match: AttentionMatch
    k: Operand
    v: Operand
    dtype: ir.DataType
    masks: MaskParts
    q_start: int | None
    group: int
    notes: tuple[str, ...]

    @property
    def is_causal(self) -> bool:
        return self.masks.causal_offset is not None


def check(match: AttentionMatch, shapes: Shapes, calculus: IndexCalculus) -> Plan:
    """The plan for a match; raises `RefusalError` with the reason where the op would compute something else."""
    dtype = _dtype(match, shapes)
    q, k, v = (_shape(operand, shapes) for operand in (match.q, match.k, match.v))
    for name, shape in (("K", k), ("V", v)):
        if len(shape) != len(q):
            raise RefusalError(f"q has rank {len(q)} and {name} rank {len(shape)}")
        if _differ(q[0], shape[0]) and match.layout != "SD":
            raise RefusalError(f"q and {name} have different batch sizes")
    k_operand, v_operand, group, notes = match.k, match.v, 1, []
    if match.layout == "BHSD":
        k_operand, v_operand, group, note = _unexpand(match, shapes)
        notes += [note] if note else []
        _check_heads(q, _shape(k_operand, shapes), _shape(v_operand, shapes))
    elif match.layout == "NSD" and (q[0] != k[0] or q[0] != v[0]):
        raise RefusalError("q, K and V merge batch and heads differently")
    rows, columns = (q[-2], k[-2]) if match.layout != "BSE" else (q[1], k[1])
    offset = columns - rows
    masks = take_apart(
        match.masks,
        calculus,
        stated=Poly() if match.is_causal and match.kv_lengths is None else None,
        usable=lambda wanted: match.kv_lengths is None and (wanted == offset or wanted.constant is not None),
    )
    if match.is_causal and match.kv_lengths is not None:
        masks.causal_offset = offset  # replaced by kv_lengths - Sq when the node is written
    for leaf in masks.added:
        if shapes.dtype(leaf.value) != dtype:
            raise RefusalError(f"a bias ({leaf.value.name}) is {shapes.dtype(leaf.value)}, and q is {dtype}")
    _check_mask_shapes(match, masks, (*q[:-1], columns) if match.layout != "BSE" else (), shapes)
    used = masks.causal_offset if masks.causal_offset is not None else Poly()
    q_start = None
    if (masks.causal_offset is not None or masks.window) and used != offset:
        q_start = used.constant
    notes += [text for text, holds in (
        ("causal", masks.causal_offset is not None),
        (f"window {masks.window}", masks.window),
        ("mask kept", masks.seen),
        ("bias kept", masks.added),
        (f"K and V un-expanded by {group}", group > 1),
    ) if holds]  # fmt: skip
    return Plan(match, k_operand, v_operand, dtype, masks, q_start, group, tuple(notes))


def _dtype(match: AttentionMatch, shapes: Shapes) -> ir.DataType:
    found = {shapes.dtype(operand.value) for operand in (match.q, match.k, match.v)}
    if len(found) != 1:
        raise RefusalError(f"q, K and V have different types ({', '.join(sorted(map(str, found)))})")
    dtype = found.pop()
    if dtype not in _DTYPES:
        raise RefusalError(f"q is {dtype}; float32, float16 and bfloat16 are what the op takes")
    if shapes.dtype(match.output) not in (dtype, None):
        raise RefusalError(f"the output is {shapes.dtype(match.output)}, and q is {dtype}")
    assert dtype is not None
    return dtype


def _shape(operand: Operand, shapes: Shapes) -> Dims:
    shape = shapes.shape(operand.value)
    if shape is None:
        raise RefusalError(f"the rank of {operand.value.name} is not known; run shape inference on the model")
    return shape if operand.perm is None else tuple(shape[axis] for axis in operand.perm)


def _differ(a: Poly, b: Poly) -> bool:
    """Whether two sizes certainly differ."""
    difference = a - b
    return difference != Poly() and (difference.constant is not None or 1 in (a.constant, b.constant))


def _unexpand(match: AttentionMatch, shapes: Shapes) -> tuple[Operand, Operand, int, str]:
    k, v = match.k, match.v
    if k.perm is not None or v.perm is not None:
        return k, v, 1, ""
    small_k = unexpand(k.value, shapes) if k.group == 1 else Unexpanded(k.value, k.group)
    small_v = unexpand(v.value, shapes)
    if k.group not in (1, small_v.group):
        raise RefusalError(f"K is repeated {k.group} times and V {small_v.group} times")
    if small_k.group != small_v.group:
        return k, v, 1, f"K repeated {small_k.group} times and V {small_v.group} times, so both stay expanded"
    return Operand(small_k.value), Operand(small_v.value), small_k.group, ""


def _check_heads(q: Dims, k: Dims, v: Dims) -> None:
    query, keys, values = (shape[1].constant for shape in (q, k, v))
    if query is None or keys is None or values is None:
        raise RefusalError("the number of heads is not a constant")
    if keys != values or query % keys:
        raise RefusalError(f"{query} query heads, {keys} of K and {values} of V do not form groups")


def _check_mask_shapes(match: AttentionMatch, masks: MaskParts, scores: Dims, shapes: Shapes) -> None:
    """`scores` are the dimensions of q·k, () where the layout does not show them."""
    for leaf in masks.kept:
        shape = shapes.shape(leaf.value)
        if shape is None or len(shape) > 4:
            raise RefusalError(
                f"the mask {leaf.value.name} has no known rank up to 4; run shape inference on the model"
            )
        if leaf.merged and len(shape) == 3 and shape[0].constant != 1 and shape[0] != scores[0]:
            raise RefusalError(f"the mask {leaf.value.name} does not follow the merged batch and heads")
    masked = None if match.root.op_type != "Softmax" else shapes.shape(match.root.outputs[0])
    if masked is not None and len(masked) == len(scores):
        for found, expected in zip(masked, scores, strict=True):
            if expected.constant == 1 and _differ(found, expected):
                raise RefusalError("a mask broadcasts the scores to more batches, heads or rows than q has")
