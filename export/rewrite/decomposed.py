"""Pattern: attention written out in MatMul, scale, mask and Softmax, walked from the Softmax outwards.

The spellings vary independently (scale on either side or on both, K transposed in one step or three, a mask added or
chosen, casts, soft-cap, merged heads), so this is a walk in which each operator on the way adds its meaning, and
anything unknown is a refusal that names the operator.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from export.rewrite.match import AttentionMatch, Layout, Operand, producer
from export.rewrite.operators import constant_array
from export.rewrite.products import PRODUCTS, equation, is_equation, is_plain
from export.rewrite.report import RefusalError
from export.rewrite.scores import Scores, keeps_last_two
from export.rewrite.shapes import Shapes

FAMILY = "decomposed"
_LAYOUTS: dict[int, Layout] = {4: "BHSD", 3: "NSD", 2: "SD"}
_LOOKAHEAD = 16  # operators between a Softmax and its product
_CARRIES_WEIGHTS = ("Cast", "Identity", "Dropout", "Where", "Mul", "Reshape", "Transpose", "Slice", "IsNaN", "Add")


def is_attention(softmax: ir.Node) -> bool:
    """Whether a Softmax feeds a product as its left operand, directly or through elementwise operators."""
    return any(_reaches_product(use.node, use.idx, _LOOKAHEAD) for use in softmax.outputs[0].uses())


def match(softmax: ir.Node, shapes: Shapes, opset: int) -> AttentionMatch:
    """The attention around a Softmax; raises `RefusalError` with the reason where it is not one that is understood."""
    _check_axis(softmax, shapes, opset)
    product = _follow_weights(softmax, shapes)
    v, output = _values_of(product)
    assert softmax.inputs[0] is not None
    scores = Scores(shapes)
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
        softcap=scores.softcap, masks=scores.masks, layout=layout,
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
    if node.op_type in PRODUCTS:
        return True
    if node.op_type not in _CARRIES_WEIGHTS:
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
            raise RefusalError(f"the attention weights are used {len(uses)} times ({others}), and the op has none")
        node, position = uses[0]
        if node.op_type in PRODUCTS and node.domain == "":
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
        return keeps_last_two(node, shapes)
    return node.op_type in ("Cast", "Identity")


def _values_of(product: ir.Node) -> tuple[ir.Value, ir.Value]:
    v = product.inputs[1]
    assert v is not None
    if product.op_type == "Einsum" and not is_equation(product, ("ij", "jd", "id")):
        raise RefusalError(f"Einsum {equation(product)} is no product of weights and values")
    if product.op_type == "Gemm" and (not is_plain(product) or product.attributes.get_int("transB", 0) != 0):
        raise RefusalError("Gemm with a bias, a transposed operand or a factor multiplies the attention weights")
    if constant_array(v) is not None:
        raise RefusalError("the Softmax is multiplied by a constant, so it is no attention over values")
    return v, product.outputs[0]
