"""Give every op node of a model the same inputs, because they share one function body.

Optional inputs of a model-local function are not portable (ONNX Runtime and TensorRT refuse or crash on an omitted
one), so a node that lacks what another node has gets a tensor that changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export import op
from export.rewrite.emit import Writer, lowest
from sparse_attention.errors import ModelError


def unify_inputs(nodes: Sequence[ir.Node]) -> None:
    """Change the given op nodes, all of one model, so that they have the same inputs and one kind of `bias`.

    Raises:
        ModelError: where a node lacks an input for which there is no neutral tensor.
    """
    present = [dict(zip(_names(node), node.inputs, strict=True)) for node in nodes]
    names = op.input_names(sorted({name for inputs in present for name in inputs})) if nodes else ()
    biases = [inputs["bias"] for inputs in present if inputs.get("bias") is not None]
    as_mask = all(bias is not None and bias.dtype == ir.DataType.BOOL for bias in biases)
    for node, inputs in zip(nodes, present, strict=True):
        write = Writer(node, dict(node.metadata_props))
        bias = inputs.get("bias")
        if bias is not None and not as_mask and bias.dtype == ir.DataType.BOOL:
            dtype = _dtype(node)
            inputs["bias"] = write("Where", bias, write.constant(0, dtype.numpy()), lowest(write, dtype))
        for name in names:
            if name not in inputs:
                inputs[name] = _neutral(write, node, name, as_mask)
        node.resize_inputs(len(names))
        for position, name in enumerate(names):
            node.replace_input_with(position, inputs[name])
        node.attributes["inputs"] = ir.AttrString("inputs", ",".join(names))


def _names(node: ir.Node) -> list[str]:
    return node.attributes["inputs"].as_string().split(",")


def _dtype(node: ir.Node) -> ir.DataType:
    q = node.inputs[0]
    if q is None or q.dtype is None:
        raise ModelError("the type of q is not known", where=node.name or "", fix="run shape inference on the model")
    return q.dtype


def _neutral(write: Writer, node: ir.Node, name: str, as_mask: bool) -> ir.Value:
    q, k = node.inputs[0], node.inputs[1]
    assert q is not None and k is not None
    if name == "bias":
        kind = np.dtype(bool) if as_mask else _dtype(node).numpy()
        return write.constant(np.full((1, 1, 1, 1), as_mask), kind)
    if name not in ("kv_lengths", "q_start", "q_lengths"):
        raise ModelError(
            f"the attentions of a model differ in the input {name!r}",
            where=node.name or "",
            fix="give every attention of the model this input, or none",
        )
    rows, columns = write("Shape", q, start=2, end=3), write("Shape", k, start=2, end=3)
    size = {"kv_lengths": columns, "q_lengths": rows}.get(name)
    if size is None:
        size = write("Sub", columns, rows)
    batch = write("Shape", q, start=0, end=1)
    return write("Expand", write("Cast", size, to=ir.DataType.INT32), batch)
