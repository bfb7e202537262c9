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
    """One mask of an attention: added to the scores, or a Boolean that is True where a key is seen (or hidden).

    `factor` scales an added mask. `merged`: it is applied to scores `[B*H, Sq, Sk]` instead of `[B, H, Sq, Sk]`.
    """

    value: ir.Value
    kind: Literal["add", "attend", "hide"]
    factor: float = 1.0
    merged: bool = False


class Leaf(NamedTuple):
    """A part of a mask: a Boolean (`hides`: True hides a key), or a bias that is scaled by `factor`."""

    value: ir.Value
    hides: bool = False
    factor: float = 1.0
    merged: bool = False


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
    added: list[Leaf] = field(default_factory=list)

    @property
    def kept(self) -> list[Leaf]:
        return [*self.seen, *self.added]


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
            walk.added(Leaf(mask.value, factor=mask.factor, merged=mask.merged))
        else:
            walk.seen(Leaf(mask.value, hides=mask.kind == "hide", merged=mask.merged))
    return walk.parts(stated, usable)


class _Walk:
    def __init__(self, calculus: IndexCalculus) -> None:
        self.calculus = calculus
        self.bands: list[tuple[Leaf, bool, tuple[AtLeastZero, ...]]] = []
        """Parts that are bands around a diagonal, whether they are added, and their bounds."""
        self.result = MaskParts()

    def seen(self, leaf: Leaf) -> None:
        """Take a Boolean apart: `and` of parts, or `not or`."""
        if self._proven(leaf, False, lambda element: negate(element) if leaf.hides else element):
            return
        operator, inputs = _operation(leaf.value)
        if operator == ("Or" if leaf.hides else "And"):
            for operand in inputs:
                self.seen(leaf._replace(value=operand))
        elif operator == "Not":
            self.seen(leaf._replace(value=inputs[0], hides=not leaf.hides))
        elif self._only_broadcasts(operator, leaf.value, inputs):
            self.seen(leaf._replace(value=inputs[0]))
        else:
            self.result.seen.append(leaf)

    def added(self, leaf: Leaf) -> None:
        """Take an additive mask apart: sums, and choices between something and a hidden score."""
        if self._proven(leaf, True, lambda element: _as_seen(element, leaf.factor)):
            return
        operator, inputs = _operation(leaf.value)
        hidden = [self._is_hidden(operand, leaf.factor) for operand in inputs[1:]] if operator == "Where" else []
        if operator == "Add":
            for operand in inputs:
                self.added(leaf._replace(value=operand))
        elif any(hidden):  # a hidden score plus anything stays hidden, so the other branch may apply everywhere
            self.seen(Leaf(inputs[0], hides=hidden[0], merged=leaf.merged))
            if not all(hidden):
                self.added(leaf._replace(value=inputs[2 if hidden[0] else 1]))
        elif self._only_broadcasts(operator, leaf.value, inputs):
            self.added(leaf._replace(value=inputs[0]))
        else:
            self.result.added.append(leaf)

    def _proven(self, leaf: Leaf, is_added: bool, meaning: Callable[[Expression], Expression]) -> bool:
        """Whether the whole value is always true or a band, and if so remember the band."""
        try:
            grid = self.calculus.grid(leaf.value)
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
        self.bands.append((leaf, is_added, bounds))
        return True

    def _is_hidden(self, value: ir.Value, factor: float) -> bool:
        number = self.calculus.shapes.scalar(value)
        if number is None:
            try:
                element = self.calculus.grid(value).element
            except NotUnderstoodError:
                return False
            return isinstance(element, Number) and element.value * factor <= HIDDEN
        return number * factor <= HIDDEN

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
        found = [bound for _, _, bounds in self.bands for part in bounds if (bound := _bound(part))]
        offsets = [distance for side, distance in found if side == "upper" and usable(distance)]
        result.causal_offset = stated if stated is not None else offsets[0] if offsets else None
        offset = result.causal_offset if result.causal_offset is not None else Poly()
        for leaf, is_added, bounds in self.bands:
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
            (result.added if is_added else result.seen).append(leaf)
        return result


def _operation(value: ir.Value) -> tuple[str, list[ir.Value]]:
    """The operator that computes a value, "" where it is none of ONNX, and its inputs."""
    node = value.producer()
    if node is None or node.domain != "":
        return "", []
    return node.op_type, [operand for operand in node.inputs if operand is not None]


def _as_seen(element: Expression, factor: float) -> Expression:
    """An additive mask of zeros and hidden scores as the condition under which a key is seen."""
    match element:
        case Choice(condition, yes, no):
            return both(_implies(condition, _as_seen(yes, factor)), _implies(negate(condition), _as_seen(no, factor)))
        case Number(value) if value == 0:
            return Truth(True)
        case Number(value) if value * factor <= HIDDEN:
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
