"""Small exported models for the tests: the op between graph inputs and outputs, with its function body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from export import op
from export.function_body import Features, function_body

OPSET = 18
SHAPES: Mapping[str, Sequence[int | str]] = {
    "q": ("batch", 4, "sequence", 64),
    "k": ("batch", 2, "past + sequence", 64),
    "v": ("batch", 2, "past + sequence", 64),
    "bias": (1, 1, "sequence", "past + sequence"),
    "kv_lengths": ("batch",),
    "q_start": ("batch",),
    "q_lengths": ("batch",),
    "sinks": (4,),
    "threshold_scale": (1,),
}


def attention_model(
    path: Path,
    *,
    inputs: Sequence[str] = ("q", "k", "v"),
    dtype: int = TensorProto.FLOAT16,
    bool_bias: bool = False,
    counts: bool = False,
    layers: int = 1,
    shapes: Mapping[str, Sequence[int | str]] = SHAPES,
    domain_version: int = op.VERSION,
    with_body: bool = True,
    **attributes: int | float | str,
) -> Path:
    """Writes a model of `layers` independent nodes that read the same inputs; returns its path."""
    types = {"q": dtype, "k": dtype, "v": dtype, "sinks": dtype, "threshold_scale": TensorProto.FLOAT}
    types["bias"] = TensorProto.BOOL if bool_bias else dtype
    given = op.attributes(
        inputs=",".join(inputs), is_causal=1, scale=0.125, prefill_threshold=0.1, decode_threshold=0.01
    )
    written = {**given, **attributes, **op.PLUGIN_ATTRIBUTES}
    nodes, results = [], []
    for layer in range(layers):
        names = [f"o{layer}"] + ([f"counts{layer}"] if counts else [])
        node = helper.make_node(op.OP_TYPE, inputs, names, f"layer{layer}", domain=op.DOMAIN)
        node.attribute.extend(helper.make_attribute(*item) for item in written.items())  # one is called `inputs`
        nodes.append(node)
        results.append(helper.make_tensor_value_info(names[0], dtype, shapes["q"]))
        if counts:
            results.append(helper.make_tensor_value_info(names[1], TensorProto.INT32, (4, 2)))
    graph = helper.make_graph(
        nodes, "attention",
        [helper.make_tensor_value_info(n, types.get(n, TensorProto.INT32), shapes[n]) for n in inputs], results,
    )  # fmt: skip
    features = Features(tuple(inputs), ir.DataType(dtype), causal=True, bool_bias=bool_bias, counts=counts)
    model = helper.make_model(
        graph, ir_version=10,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(op.DOMAIN, domain_version)],
        functions=[ir.to_proto(function_body(features, OPSET))] if with_body else [],
    )  # fmt: skip
    onnx.save(model, path)
    return path
