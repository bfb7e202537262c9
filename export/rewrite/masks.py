"""What a mask says: causal, a window, and what is left, which stays a mask.

A mask is taken apart along its own And, Where, Add and Expand nodes. Each part is evaluated by the index calculus: a
part that is always true goes, `j <= i + offset` becomes causality, `j > i + offset - window` a window. Whatever is not
proven stays, as a Boolean mask or as a bias; nothing is ever dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import onnx_ir as ir

from export.rewrite.expression import (
    All,
    AtLeastZero,
    Choice,
    Expression,
    NotUnderstoodError,
    Number,
    Truth,
    both,
    index,
    negate,
)
from export.rewrite.index_calculus import IndexCalculus, shift
from export.rewrite.poly import Poly

HIDDEN = -1e4
"""A score at or below this is a hidden one: exp(-1e4 + x) is exactly 0 in float32 beside any score above x - 9890.
Exporters and models write -inf, the dtype's minimum, -1e9 and -1e4 for the same purpose."""

_ROW, _COLUMN = index(2), index(3)


class Mask(NamedTuple):
    """One mask of an attention: added to the scores, or a Boolean that is True where a key is seen (or hidden)."""

    value: ir.Value
    kind: Literal["add", "attend", "hide"]


class Leaf(NamedTuple):
    """A Boolean part of a mask; `hides` tells that True hides a key."""

    value: ir.Value
    hides: bool


@dataclass
class MaskParts:
    """The mask of one attention, taken apart.

    `causal_offset`: row i sees key j only where j <= i + offset, None where that is not so. `window`: and only where
    j > i + offset - window (0 = none; the offset is 0 where there is no causality). `seen`, `added`: what was not
    proven.
    """

    causal_offset: Poly | None = None
    window: int = 0
    seen: list[Leaf] = field(default_factory=list)
    added: list[ir.Value] = field(default_factory=list)


def take_apart(
    masks: list[Mask], calculus: IndexCalculus, *, stated: Poly | None, usable: Callable[[Poly], bool]
) -> MaskParts:
    """Split the masks of one attention into what the op's attributes say and what stays an input.

    Args:
        masks: the masks, all of which apply.
        calculus: over the graph of the masks.
        stated: offset of a causality that holds already, by an attribute.
        usable: whether the op can be given this offset; a causal mask with another one stays a mask.
    """
    walk = _Walk(calculus)
    for mask in masks:
        if mask.kind == "add":
            walk.added(mask.value)
        else:
            walk.seen(mask.value, mask.kind == "hide")
    return walk.parts(stated, usable)


class _Walk:
    def __init__(self, calculus: IndexCalculus) -> None:
        self.calculus = calculus
        self.bands: list[tuple[Leaf | ir.Value, tuple[AtLeastZero, ...]]] = []
        self.result = MaskParts()

    def seen(self, value: ir.Value, hides: bool) -> None:
        """Take a Boolean apart: `and` of parts, or `not or`."""
        if self._proven(Leaf(value, hides), value, lambda element: negate(element) if hides else element):
            return
        node = value.producer()
        operator = node.op_type if node is not None and node.domain == "" else ""
        inputs = [operand for operand in node.inputs if operand is not None] if node is not None else []
        if operator == ("Or" if hides else "And"):
            for operand in inputs:
                self.seen(operand, hides)
        elif operator == "Not":
            self.seen(inputs[0], not hides)
        elif self._only_broadcasts(operator, value, inputs):
            self.seen(inputs[0], hides)
        else:
            self.result.seen.append(Leaf(value, hides))

    def added(self, value: ir.Value) -> None:
        """Take an additive mask apart: sums, and choices between something and a hidden score."""
        if self._proven(value, value, _as_seen):
            return
        node = value.producer()
        operator = node.op_type if node is not None and node.domain == "" else ""
        inputs = [operand for operand in node.inputs if operand is not None] if node is not None else []
        if operator == "Add":
            for operand in inputs:
                self.added(operand)
        elif operator == "Where" and self._is_hidden(inputs[2]):
            self.seen(inputs[0], hides=False)
            self._chosen(inputs[1])
        elif operator == "Where" and self._is_hidden(inputs[1]):
            self.seen(inputs[0], hides=True)
            self._chosen(inputs[2])
        elif self._only_broadcasts(operator, value, inputs):
            self.added(inputs[0])
        else:
            self.result.added.append(value)

    def _chosen(self, value: ir.Value) -> None:
        # A hidden score plus anything else stays hidden, so the other branch may apply everywhere.
        self.added(value)

    def _proven(self, source: Leaf | ir.Value, value: ir.Value, meaning: Callable[[Expression], Expression]) -> bool:
        """Whether the whole value is always true or a band, and if so remember the band."""
        try:
            grid = self.calculus.grid(value)
            if len(grid.shape) > 4:
                return False
            element = meaning(shift(grid.element, len(grid.shape), 4 - len(grid.shape)))
        except NotUnderstoodError:
            return False
        parts = element.parts if isinstance(element, All) else (element,)
        bounds = tuple(part for part in parts if isinstance(part, AtLeastZero) and _bound(part) is not None)
        if element == Truth(True):
            return True
        if len(bounds) != len(parts):
            return False
        self.bands.append((source, bounds))
        return True

    def _is_hidden(self, value: ir.Value) -> bool:
        number = self.calculus.shapes.scalar(value)
        if number is None:
            try:
                element = self.calculus.grid(value).element
            except NotUnderstoodError:
                return False
            return isinstance(element, Number) and element.value <= HIDDEN
        return number <= HIDDEN

    def _only_broadcasts(self, operator: str, value: ir.Value, inputs: list[ir.Value]) -> bool:
        """Whether a node only does what broadcasting would do anyway, or nothing."""
        if operator == "Identity" or (operator == "Cast" and inputs[0].dtype == ir.DataType.BOOL == value.dtype):
            return True
        if operator not in ("Expand", "Unsqueeze"):
            return False
        outer, inner = self.calculus.shapes.shape(value), self.calculus.shapes.shape(inputs[0])
        if outer is None or inner is None:
            return False
        if operator == "Expand":
            return len(outer) == len(inner)
        added = len(outer) - len(inner)
        return outer[added:] == inner and all(dim.constant == 1 for dim in outer[:added])

    def parts(self, stated: Poly | None, usable: Callable[[Poly], bool]) -> MaskParts:
        """Decide on one offset; a band that does not fit it stays a mask."""
        result = self.result
        found = [bound for _, bounds in self.bands for part in bounds if (bound := _bound(part))]
        offsets = [distance for side, distance in found if side == "upper" and usable(distance)]
        result.causal_offset = stated if stated is not None else offsets[0] if offsets else None
        offset = result.causal_offset if result.causal_offset is not None else Poly()
        for source, bounds in self.bands:
            window = result.window
            for part in bounds:
                side, distance = _bound(part) or ("", Poly())
                if side == "upper":
                    if distance != result.causal_offset:
                        break
                    continue
                width = (distance + 1 + offset).constant  # j - i + distance >= 0  <=>  j > i + offset - width
                if width is None or width <= 0 or window not in (0, width) or not usable(offset):
                    break
                window = width
            else:
                result.window = window
                continue
            if isinstance(source, Leaf):
                result.seen.append(source)
            else:
                result.added.append(source)
        return result


def _as_seen(element: Expression) -> Expression:
    """An additive mask of zeros and hidden scores as the condition under which a key is seen."""
    match element:
        case Choice(condition, yes, no):
            return both(_implies(condition, _as_seen(yes)), _implies(negate(condition), _as_seen(no)))
        case Number(value) if value == 0:
            return Truth(True)
        case Number(value) if value <= HIDDEN:
            return Truth(False)
        case Poly() if element == Poly():
            return Truth(True)
    raise NotUnderstoodError("an additive mask that is more than a mask")


def _implies(condition: Expression, consequence: Expression) -> Expression:
    """`not condition or consequence`."""
    return negate(both(condition, negate(consequence)))


def _bound(part: AtLeastZero) -> tuple[Literal["upper", "lower"], Poly] | None:
    """`j <= i + d` as ("upper", d), `j >= i - d` as ("lower", d), d free of indices; None for anything else."""
    for side, difference in (("upper", _ROW - _COLUMN), ("lower", _COLUMN - _ROW)):
        distance = part.poly - difference
        if not any(name.startswith("#") for name in distance.symbols):
            return side, distance  # type: ignore[return-value]
    return None
