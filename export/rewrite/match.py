"""What every family's pattern delivers: an attention with its operands, before anything is checked or changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import onnx_ir as ir

from export.rewrite.masks import Mask


class Operand(NamedTuple):
    """A tensor as the op needs it: `value`, transposed by `perm` where that is not None.

    `group`: how often the heads of `value` were repeated on the way, which is undone already.
    """

    value: ir.Value
    perm: tuple[int, ...] | None = None
    group: int = 1


Layout = Literal["BHSD", "NSD", "SD", "BSE"]
"""How q, k, v and the output lie: the op's own layout; batch and heads merged; neither; heads in the hidden axis."""


@dataclass
class AttentionMatch:
    """One attention as found in a graph.

    `root` is its Softmax or Attention node, `output` the value that the op's output replaces. `is_causal` is causality
    stated by an attribute, row i seeing key j <= i. `kv_lengths` is an int64 `[B]` tensor of valid keys. `heads` are
    the query and K/V heads where the layout does not show them (NSD: how many are merged into N; BSE: both).
    """

    family: str
    root: ir.Node
    output: ir.Value
    q: Operand
    k: Operand
    v: Operand
    scale: float
    layout: Layout = "BHSD"
    softcap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    is_causal: bool = False
    kv_lengths: ir.Value | None = None
    heads: tuple[int, int] = (1, 1)


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node of the default domain that computes a value, where it is one of the given types."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and (not op_types or node.op_type in op_types) else None
