"""The upper half of a decomposed attention: from the Softmax up to the product of q and K."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from export.rewrite.gqa import Unexpanded, repeated_heads
from export.rewrite.masks import HIDDEN, Mask
from export.rewrite.match import Operand, producer
from export.rewrite.operators import constant_array
from export.rewrite.products import PRODUCTS, equation, is_equation, is_plain
from export.rewrite.report import RefusalError
from export.rewrite.shapes import Shapes

_LOOKAHEAD = 16  # operators between a mask and the product it is applied to
_PASSED = ("Mul", "Div", "Add", "Where", "Tanh", "Cast", "Identity", "Reshape")


class Scores:
    """From the Softmax up to the product of q and k: what each operator on the way means."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.factor = 1.0
        self.softcap = 0.0
        self.masks: list[Mask] = []
        self.heads: int | None = None
        self.q = self.k = Operand(ir.Value())

    def walk(self, value: ir.Value) -> None:
        node = producer(value)
        while node is not None and node.op_type not in PRODUCTS:
            step = getattr(self, f"_{node.op_type.lower()}", None)
            if step is None:
                raise RefusalError(f"{node.op_type} lies between q·k and the Softmax")
            node = producer(step(node))
        if node is None:
            raise RefusalError("the Softmax is not computed from a product of q and k")
        self._product(node)

    def _cast(self, node: ir.Node) -> ir.Value | None:
        return node.inputs[0]

    _identity = _cast

    def _reshape(self, node: ir.Node) -> ir.Value | None:
        after = self.shapes.shape(node.outputs[0])
        if not keeps_last_two(node, self.shapes) or after is None:
            raise RefusalError("a Reshape mixes the rows or columns of the scores")
        if len(after) == 4 and after[1].constant is not None:
            self.heads = after[1].constant
        return node.inputs[0]

    def _mul(self, node: ir.Node) -> ir.Value | None:
        rest, factor = _scaled(node, self.shapes)
        if factor is None:
            raise RefusalError("the scores are multiplied by something that is not one number")
        self._scale(factor)
        return rest

    _div = _mul

    def _scale(self, factor: float) -> None:
        self.factor *= factor

    def _tanh(self, node: ir.Node) -> ir.Value | None:
        """`c * tanh(f * s)` is a soft-cap of c on scores scaled by c * f."""
        if self.softcap:
            raise RefusalError("two soft-caps")
        self.softcap = self.factor
        return node.inputs[0]

    def _add(self, node: ir.Node) -> ir.Value | None:
        left, right = node.inputs
        scores, mask = (left, right) if self._leads_to_product(left) else (right, left)
        if mask is not None:
            self._mask(Mask(mask, "add", self.factor), node)
        return scores

    def _sub(self, node: ir.Node) -> ir.Value | None:
        raise RefusalError("a mask is subtracted from the scores")

    def _where(self, node: ir.Node) -> ir.Value | None:
        condition, yes, no = node.inputs
        scores, fill, kind = (yes, no, "attend") if self._leads_to_product(yes) else (no, yes, "hide")
        hidden = self.shapes.scalar(fill)
        if condition is None or hidden is None or hidden > HIDDEN:
            fill_text = "data" if hidden is None else f"{hidden:g}"
            raise RefusalError(f"a Where replaces scores by {fill_text}, which does not hide them")
        self._mask(Mask(condition, kind), node)  # type: ignore[arg-type]
        return scores

    def _mask(self, mask: Mask, node: ir.Node) -> None:
        if self.softcap:
            raise RefusalError("a mask is applied before the soft-cap, so that masked keys are still seen")
        if mask.factor <= 0:
            raise RefusalError(f"the scores are scaled by {mask.factor} after a mask")
        self.masks.append(mask._replace(merged=self.shapes.rank(node.outputs[0]) == 3))

    def _leads_to_product(self, value: ir.Value | None, steps: int = _LOOKAHEAD) -> bool:
        node = producer(value)
        if node is None or not steps:
            return False
        if node.op_type in PRODUCTS:
            return True
        if node.op_type not in _PASSED:
            return False
        operands = node.inputs[1:] if node.op_type == "Where" else node.inputs
        return any(self._leads_to_product(operand, steps - 1) for operand in operands)

    def _product(self, node: ir.Node) -> None:
        q, k = node.inputs[:2]
        assert q is not None and k is not None
        transposed = True  # whether the right operand is K with its last two axes swapped
        if node.op_type == "Einsum":
            transposed = is_equation(node, ("id", "dj", "ij"))
            if not transposed and not is_equation(node, ("id", "jd", "ij")):
                raise RefusalError(f"Einsum {equation(node)} is no product of queries and keys")
        elif node.op_type == "Gemm":
            transposed = node.attributes.get_int("transB", 0) == 0
            if not is_plain(node, with_factor=True):
                raise RefusalError("Gemm with a bias or a transposed left operand computes the scores")
            self._scale(node.attributes.get_float("alpha", 1.0))
        self.q = Operand(self._peel(q))
        k = self._peel(k)
        if not transposed:
            self.k = Operand(k)
            return
        if constant_array(q) is not None or constant_array(k) is not None:
            raise RefusalError("q or k is a constant, so this is no attention")
        untransposed = _untranspose(k, self.shapes)
        self.k = untransposed._replace(value=self._peel(untransposed.value))

    def _peel(self, value: ir.Value) -> ir.Value:
        """Take factors and widening casts off q or k."""
        while True:
            node = producer(value, "Mul", "Div", "Cast", "Identity")
            if node is None or node.inputs[0] is None:
                return value
            if node.op_type in ("Mul", "Div"):
                rest, factor = _scaled(node, self.shapes)
                if factor is None or rest is None:
                    return value
                self._scale(factor)
                value = rest
            elif node.op_type == "Identity" or _widens(node, self.shapes):
                value = node.inputs[0]
            else:
                return value


class _Factor(NamedTuple):
    rest: ir.Value | None
    factor: float | None


def _scaled(node: ir.Node, shapes: Shapes) -> _Factor:
    """`x * c`, `c * x` or `x / c` as x and the factor."""
    left, right = node.inputs
    number = shapes.scalar(right)
    if number is not None:
        return _Factor(left, number if node.op_type == "Mul" else (1.0 / number if number else None))
    number = shapes.scalar(left) if node.op_type == "Mul" else None
    return _Factor(right, number)


def _widens(node: ir.Node, shapes: Shapes) -> bool:
    source = shapes.dtype(node.inputs[0]) if node.inputs[0] is not None else None
    return shapes.dtype(node.outputs[0]) == ir.DataType.FLOAT and source in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _untranspose(value: ir.Value, shapes: Shapes) -> Operand:
    """K from its transpose: undo a Transpose, or the Reshape-Transpose-Reshape of opset 18, or transpose it back."""
    rank = shapes.rank(value)
    if rank is None or rank < 2:
        raise RefusalError("the rank of K is not known")
    node = producer(value, "Transpose")
    if node is not None and node.inputs[0] is not None:
        perm = list(node.attributes.get_ints("perm", tuple(range(rank))[::-1]))
        perm[-2:] = perm[:-3:-1]
        return Operand(node.inputs[0], None if perm == list(range(rank)) else tuple(perm))
    split = producer(value, "Reshape")
    swap = producer(split.inputs[0], "Transpose") if split is not None else None
    merge = producer(swap.inputs[0], "Reshape") if swap is not None else None
    if merge is not None and swap is not None and merge.inputs[0] is not None:
        repeated = repeated_heads(merge.inputs[0], shapes)  # a repetition of heads may be merged right away
        small = Unexpanded(merge.inputs[0], 1) if repeated is None else repeated
        source, target, merged = shapes.shape(small.value), shapes.shape(value), shapes.shape(merge.outputs[0])
        if (
            source is not None
            and len(source) == 4
            and merged is not None
            and tuple(swap.attributes.get_ints("perm", ())) == (0, 2, 1)
            and merged[-2:] == source[-2:]
            and target == (source[0], source[1] * small.group, source[3], source[2])
        ):
            return Operand(small.value, group=small.group)
    return Operand(value, (*range(rank - 2), rank - 1, rank - 2))


def keeps_last_two(node: ir.Node, shapes: Shapes) -> bool:
    """Whether a Reshape leaves rows and columns of the scores alone."""
    before = shapes.shape(node.inputs[0]) if node.inputs[0] is not None else None
    after = shapes.shape(node.outputs[0])
    return before is not None and after is not None and before[-2:] == after[-2:]
