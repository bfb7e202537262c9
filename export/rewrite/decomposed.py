"""Pattern: attention written out in MatMul, scale, mask and Softmax, walked from the Softmax outwards.

The spellings vary independently (scale on either side or on both, K transposed in one step or three, a mask added or
chosen, casts, soft-cap, merged heads), so this is a walk in which each operator on the way adds its meaning, and
anything unknown is a refusal that names the operator.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import onnx_ir as ir

from export.rewrite.masks import HIDDEN, Mask
from export.rewrite.match import AttentionMatch, Layout, Operand, producer
from export.rewrite.report import RefusalError
from export.rewrite.shapes import Shapes

FAMILY = "decomposed"
_LAYOUTS: dict[int, Layout] = {4: "BHSD", 3: "NSD", 2: "SD"}
_LOOKAHEAD = 16  # operators between a Softmax and its MatMul


def is_attention(softmax: ir.Node) -> bool:
    """Whether a Softmax feeds a product as its left operand, directly or through elementwise operators."""
    return any(_reaches_product(use.node, use.idx, _LOOKAHEAD) for use in softmax.outputs[0].uses())


def match(softmax: ir.Node, shapes: Shapes, opset: int) -> AttentionMatch:
    """The attention around a Softmax; raises `RefusalError` with the reason where it is not one that is understood."""
    _check_axis(softmax, shapes, opset)
    product = _follow_weights(softmax, shapes)
    v, output = _values_of(product)
    assert softmax.inputs[0] is not None
    scores = _Scores(shapes)
    scores.walk(softmax.inputs[0])
    rank = shapes.rank(scores.q.value)
    if rank != shapes.rank(v) or rank not in _LAYOUTS:
        raise RefusalError(f"q has rank {rank} and v rank {shapes.rank(v)}; ranks 2, 3 and 4 are understood")
    if not scores.factor > 0 or not math.isfinite(scores.factor):
        raise RefusalError(f"the scores are scaled by {scores.factor}, and the op's scale is positive")
    layout = _LAYOUTS[rank]
    heads = (scores.heads or merged_heads(scores.q.value, shapes)) if layout == "NSD" else 1
    return AttentionMatch(
        family=FAMILY, root=softmax, output=output, q=scores.q, k=scores.k, v=Operand(v), scale=scores.factor,
        softcap=scores.softcap, masks=scores.masks, mask_rank=scores.mask_rank or rank, layout=layout,
        heads=(heads, heads),
    )  # fmt: skip


def merged_heads(value: ir.Value, shapes: Shapes) -> int:
    """How many heads a `[B*H, S, D]` tensor merges, from the Reshape that split them off; 1 where that is unknown."""
    node = producer(value, "Transpose", "Mul", "Reshape")
    while node is not None and node.op_type != "Reshape":
        node = producer(node.inputs[0], "Transpose", "Mul", "Reshape")
    source = shapes.shape(node.inputs[0]) if node is not None and node.inputs[0] is not None else None
    if node is None or source is None:
        return 1
    target = shapes.shape(node.outputs[0])
    if len(source) == 3 and target is not None and len(target) == 3:  # [S, B, H*D] to [S, B*H, D]
        heads = source[2].divided_by(target[2])
        return heads.constant or 1 if heads is not None and target[1] == source[1] * heads else 1
    if len(source) == 4 and target is not None and target[0] == source[0] * source[1]:  # [B, H, S, D] to [B*H, S, D]
        return source[1].constant or 1
    return 1


def _check_axis(softmax: ir.Node, shapes: Shapes, opset: int) -> None:
    axis = softmax.attributes.get_int("axis", -1 if opset >= 13 else 1)
    rank = shapes.rank(softmax.outputs[0])
    if axis != -1 and (rank is None or axis != rank - 1):
        raise RefusalError(f"the Softmax runs over axis {axis}, not over the keys (the last axis)")


def _reaches_product(node: ir.Node, position: int, steps: int) -> bool:
    if node.domain != "" or not steps:
        return False
    if node.op_type in ("MatMul", "Gemm", "Einsum"):
        return True
    if node.op_type not in ("Cast", "Identity", "Dropout", "Where", "Mul", "Reshape", "Transpose", "Slice", "IsNaN", "Add"):
        return False
    return any(_reaches_product(use.node, use.idx, steps - 1) for use in node.outputs[0].uses())


def _follow_weights(softmax: ir.Node, shapes: Shapes) -> ir.Node:
    """From the Softmax down to its product with V; nothing else may look at the weights."""
    weights = softmax.outputs[0]
    while True:
        if weights.is_graph_output():
            raise RefusalError(f"the attention weights are an output of the model ({weights.name})")
        uses = [(use.node, use.idx) for use in weights.uses()]
        guard = next((node for node, _ in uses if node.op_type == "IsNaN" and node.domain == ""), None)
        if guard is not None:  # rows that see nothing become 0, as in the op
            uses = [(node, at) for node, at in uses if node is not guard]
            if len(uses) != 1 or not _is_guard(uses[0][0], guard, weights, shapes):
                raise RefusalError("the attention weights are tested for NaN in an unknown way")
        if len(uses) != 1:
            others = ", ".join(sorted({node.op_type for node, _ in uses}))
            raise RefusalError(f"the attention weights are used {len(uses)} times ({others}), and the op has no such output")
        node, position = uses[0]
        if node.op_type in ("MatMul", "Gemm", "Einsum") and node.domain == "":
            if position != 0:
                raise RefusalError(f"the attention weights are the right operand of {node.op_type}")
            return node
        if guard is None and not _passes(node, position, shapes):
            raise RefusalError(f"{node.op_type} lies between the Softmax and the product with V")
        weights = node.outputs[0]


def _is_guard(node: ir.Node, test: ir.Node, weights: ir.Value, shapes: Shapes) -> bool:
    return (
        node.op_type == "Where"
        and node.inputs[0] is test.outputs[0]
        and shapes.scalar(node.inputs[1]) == 0
        and node.inputs[2] is weights
    )


def _passes(node: ir.Node, position: int, shapes: Shapes) -> bool:
    if node.domain != "" or position != 0:
        return False
    if node.op_type == "Dropout":  # the mask output or a training mode that may be on is something else
        training = node.inputs[2] if len(node.inputs) > 2 else None
        unused = all(not extra.uses() for extra in node.outputs[1:])
        return unused and (training is None or shapes.scalar(training) == 0)
    if node.op_type == "Reshape":
        return _keeps_last_two(node, shapes)
    return node.op_type in ("Cast", "Identity")


def _keeps_last_two(node: ir.Node, shapes: Shapes) -> bool:
    before = shapes.shape(node.inputs[0]) if node.inputs[0] is not None else None
    after = shapes.shape(node.outputs[0])
    return before is not None and after is not None and before[-2:] == after[-2:]


def _values_of(product: ir.Node) -> tuple[ir.Value, ir.Value]:
    v = product.inputs[1]
    assert v is not None
    if product.op_type == "Einsum" and not _is_equation(product, ("ij", "jd", "id")):
        raise RefusalError(f"Einsum {_equation(product)} is no product of weights and values")
    if product.op_type == "Gemm" and (not _is_plain(product) or product.attributes.get_int("transB", 0)):
        raise RefusalError("Gemm with a bias, a transposed operand or a factor multiplies the attention weights")
    if v.const_value is not None:
        raise RefusalError("the Softmax is multiplied by a constant, so it is no attention over values")
    return v, product.outputs[0]


class _Scores:
    """From the Softmax up to the product of q and k: what each operator on the way means."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.factor = 1.0
        self.softcap = 0.0
        self.masks: list[Mask] = []
        self.mask_rank: int | None = None
        self.heads: int | None = None
        self.q = self.k = Operand(ir.Value())

    def walk(self, value: ir.Value) -> None:
        node = producer(value)
        while node is not None and node.op_type not in ("MatMul", "Gemm", "Einsum"):
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
        if not _keeps_last_two(node, self.shapes) or after is None:
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
            self._mask(Mask(mask, "add"), node)
        return scores

    def _sub(self, node: ir.Node) -> ir.Value | None:
        raise RefusalError("a mask is subtracted from the scores")

    def _where(self, node: ir.Node) -> ir.Value | None:
        condition, yes, no = node.inputs
        scores, fill, kind = (yes, no, "attend") if self._leads_to_product(yes) else (no, yes, "hide")
        hidden = self.shapes.scalar(fill)
        if condition is None or hidden is None or hidden > HIDDEN:
            raise RefusalError(f"a Where replaces scores by {'data' if hidden is None else hidden}, which does not hide them")
        self._mask(Mask(condition, kind), node)  # type: ignore[arg-type]
        return scores

    def _mask(self, mask: Mask, node: ir.Node) -> None:
        if self.softcap:
            raise RefusalError("a mask is applied before the soft-cap, so that masked keys are still seen")
        if mask.kind == "add" and self.factor != 1.0:
            raise RefusalError("a mask is added before the scores are scaled")
        rank = self.shapes.rank(node.outputs[0])
        if self.mask_rank not in (None, rank):
            raise RefusalError("masks are applied both before and after the heads are merged")
        self.mask_rank = rank
        self.masks.append(mask)

    def _leads_to_product(self, value: ir.Value | None, steps: int = _LOOKAHEAD) -> bool:
        node = producer(value)
        if node is None or not steps:
            return False
        if node.op_type in ("MatMul", "Gemm", "Einsum"):
            return True
        if node.op_type not in ("Mul", "Div", "Add", "Where", "Tanh", "Cast", "Identity", "Reshape"):
            return False
        operands = node.inputs[1:] if node.op_type == "Where" else node.inputs[:1 if node.op_type == "Reshape" else None]
        return any(self._leads_to_product(operand, steps - 1) for operand in operands)

    def _product(self, node: ir.Node) -> None:
        q, k = node.inputs[:2]
        assert q is not None and k is not None
        transposed = True  # whether the right operand is K with its last two axes swapped
        if node.op_type == "Einsum":
            transposed = _is_equation(node, ("id", "dj", "ij"))
            if not transposed and not _is_equation(node, ("id", "jd", "ij")):
                raise RefusalError(f"Einsum {_equation(node)} is no product of queries and keys")
        elif node.op_type == "Gemm":
            transposed = not node.attributes.get_int("transB", 0)
            if not _is_plain(node, with_factor=True):
                raise RefusalError("Gemm with a bias or a transposed left operand computes the scores")
            self._scale(node.attributes.get_float("alpha", 1.0))
        self.q = Operand(self._peel(q))
        k = self._peel(k)
        if not transposed:
            self.k = Operand(k)
            return
        if q.const_value is not None or k.const_value is not None:
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
            elif node.op_type == "Identity" or _widens(node):
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


def _widens(node: ir.Node) -> bool:
    source = node.inputs[0].dtype if node.inputs[0] is not None else None
    return node.outputs[0].dtype == ir.DataType.FLOAT and source in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _untranspose(value: ir.Value, shapes: Shapes) -> Operand:
    """K from its transpose: undo a Transpose, or the Reshape-Transpose-Reshape of opset 18, or transpose it back."""
    rank = shapes.rank(value)
    if rank is None or rank < 2:
        raise RefusalError("the rank of K is not known")
    node = producer(value, "Transpose")
    if node is not None and node.inputs[0] is not None:
        perm = list(node.attributes.get_ints("perm", None) or range(rank)[::-1])
        perm[-2:] = perm[:-3:-1]
        return Operand(node.inputs[0], None if perm == list(range(rank)) else tuple(perm))
    split = producer(value, "Reshape")
    swap = producer(split.inputs[0], "Transpose") if split is not None else None
    merge = producer(swap.inputs[0], "Reshape") if swap is not None else None
    if merge is not None and swap is not None and merge.inputs[0] is not None:
        source, target = shapes.shape(merge.inputs[0]), shapes.shape(value)
        merged = shapes.shape(merge.outputs[0])
        if (
            source is not None
            and merged is not None
            and tuple(swap.attributes.get_ints("perm", None) or ()) == (0, 2, 1)
            and merged[-2:] == source[-2:]
            and target == (*source[:-2], source[-1], source[-2])
        ):
            return Operand(merge.inputs[0])
    return Operand(value, (*range(rank - 2), rank - 1, rank - 2))


def _equation(node: ir.Node) -> str:
    return node.attributes["equation"].as_string().replace(" ", "")


def _is_equation(node: ir.Node, last: tuple[str, str, str]) -> bool:
    """Whether an Einsum is a batched product whose operands end in the given letters, up to renaming."""
    operands, _, result = _equation(node).partition("->")
    left, _, right = operands.partition(",")
    terms = (left, right, result)
    batch = left[:-2]
    if any(len(term) < 2 or "." in term or term[:-2] != batch for term in terms):
        return False
    names: dict[str, str] = {}
    for term, expected in zip(terms, last, strict=True):
        for letter, name in zip(term[-2:], expected, strict=True):
            if names.setdefault(name, letter) != letter:
                return False
    return len(set(names.values())) == len(names) and not set(batch) & set(names.values())


def _is_plain(node: ir.Node, with_factor: bool = False) -> bool:
    """A Gemm without bias and transposed left operand, and (unless allowed) without factor."""
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    factor = node.attributes.get_float("alpha", 1.0)
    return not has_bias and not node.attributes.get_int("transA", 0) and (with_factor or factor == 1.0)
