"""Pattern: the ONNX operator `Attention` (opset 23 and later), with 4-D operands or heads in the hidden axis."""

from __future__ import annotations

import math

import onnx_ir as ir

from export.rewrite.masks import Mask
from export.rewrite.match import AttentionMatch, Layout, Operand
from export.rewrite.report import RefusalError
from export.rewrite.shapes import Shapes

FAMILY = "Attention"
_INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
_OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")


def match(node: ir.Node, shapes: Shapes) -> AttentionMatch:
    """The attention of an `Attention` node; raises `RefusalError` for what the op does not do.

    Causality of the operator aligns at the upper left (row 0 sees key 0), or with `nonpad_kv_seqlen` at the last valid
    key; a soft-cap comes before the mask (as in onnx 1.23's text).
    """
    inputs = {name: value for name, value in zip(_INPUTS, node.inputs, strict=False) if value is not None}
    outputs = dict(zip(_OUTPUTS, node.outputs, strict=False))
    for name in ("past_key", "past_value"):
        if name in inputs:
            raise RefusalError(f"the operator keeps its own KV cache ({name}); pass K and V already joined")
    for name in _OUTPUTS[1:]:
        value = outputs.get(name)
        if value is not None and (value.uses() or value.is_graph_output()):
            raise RefusalError(f"its output {name} is used, and the op has no such output")
    rank = shapes.rank(inputs["Q"])
    if rank not in (3, 4):
        raise RefusalError(f"Q has rank {rank}; 3 and 4 are what the operator takes")
    layout: Layout = "BHSD" if rank == 4 else "BSE"
    heads = (node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0))
    if layout == "BSE" and not all(heads):
        raise RefusalError("3-D inputs need the attributes q_num_heads and kv_num_heads")
    scale = _scale(node, shapes, layout, heads)
    masks = []
    if "attn_mask" in inputs:
        mask = inputs["attn_mask"]
        if "nonpad_kv_seqlen" in inputs:
            raise RefusalError("attn_mask with nonpad_kv_seqlen may be shorter than K")
        masks.append(Mask(mask, "attend" if shapes.dtype(mask) == ir.DataType.BOOL else "add"))
    return AttentionMatch(
        family=FAMILY, root=node, output=outputs["Y"], q=Operand(inputs["Q"]), k=Operand(inputs["K"]),
        v=Operand(inputs["V"]), scale=scale, layout=layout, softcap=node.attributes.get_float("softcap", 0.0),
        masks=masks, is_causal=bool(node.attributes.get_int("is_causal", 0)),
        kv_lengths=inputs.get("nonpad_kv_seqlen"), heads=heads,
    )  # fmt: skip


def _scale(node: ir.Node, shapes: Shapes, layout: Layout, heads: tuple[int, int]) -> float:
    """The written scale, or 1/sqrt(D)."""
    if "scale" in node.attributes:
        scale = node.attributes["scale"].as_float()
        if not scale > 0:
            raise RefusalError(f"the scale is {scale}, and the op's scale is positive")
        return scale
    shape = shapes.shape(node.inputs[0]) if node.inputs[0] is not None else None
    size = shape[-1].constant if shape is not None else None
    if not size:
        raise RefusalError("the head size is not known, and so the implied scale 1/sqrt(D) is not")
    return 1.0 / math.sqrt(size if layout == "BHSD" else size / heads[0])
