"""The model as TensorRT gets it: every block-skip node bound to the plugin, no function body, no boolean plugin input.

TensorRT binds a node to a plugin by its attributes `plugin_namespace` and `plugin_version`. Parsers up to 10.1 look for
a function body first, and would silently build that one: it is left out. Boolean tensors are documented as unsupported
inputs of plugins; a boolean mask therefore becomes an additive one whose hidden entries are the lowest number of the
type: the rule hides a key at half of that, so both say exactly the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from export import op
from export.engine.model import AttentionNode, ExportedModel, is_attention
from sparse_attention.errors import UsageError

LOWEST: Mapping[int, float] = {TensorProto.FLOAT16: -65504.0, TensorProto.BFLOAT16: -3.3895313892515355e38}

OUTPUTS_ATTRIBUTE = "outputs"
"""Tells the plugin which outputs the node uses; the parser does not. Without it the plugin produces both."""


@dataclass(frozen=True)
class Prepared:
    """The model to parse, and what had to be rewritten in it (empty: `trtexec` takes the original file as well)."""

    proto: onnx.ModelProto
    changes: tuple[str, ...]


def prepare(model: ExportedModel) -> Prepared:
    """A copy of the graph for TensorRT's parser. Raises UsageError for a type the kernels do not have."""
    for node in model.nodes:
        _check_type(node)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    changes: list[str] = []
    by_name = {node.name: node for node in model.nodes}
    _prepare_graph(proto.graph, by_name, changes)
    bodies = [function for function in proto.functions if (function.domain, function.name) != (op.DOMAIN, op.OP_TYPE)]
    del proto.functions[:]
    proto.functions.extend(bodies)
    return Prepared(proto, tuple(changes))


def _check_type(node: AttentionNode) -> None:
    q = node.inputs["q"]
    if q.elem_type not in (TensorProto.UNDEFINED, *LOWEST):
        raise UsageError(
            "The plugin computes in float16 or bfloat16.", where=f"node {node.name}, input q",
            found=q.type_name, fix="Export the model with --dtype float16 or --dtype bfloat16.",
        )  # fmt: skip


def _prepare_graph(graph: onnx.GraphProto, nodes: dict[str, AttentionNode], changes: list[str]) -> None:
    masks: dict[str, str] = {}  # boolean tensor -> its additive twin, shared by the layers
    result: list[onnx.NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _prepare_graph(body, nodes, changes)
        if is_attention(node):
            info = nodes[node.name]
            _bind(node, info)
            if "bias" in info.inputs and info.inputs["bias"].elem_type == TensorProto.BOOL:
                position = list(info.inputs).index("bias")
                mask = node.input[position]
                if mask not in masks:
                    masks[mask] = f"{mask}_additive"
                    result += _additive(mask, masks[mask], info.inputs["q"].elem_type or TensorProto.FLOAT16)
                    changes.append(f"boolean mask {mask} written as an additive one")
                node.input[position] = masks[mask]
        result.append(node)
    del graph.node[:]
    graph.node.extend(result)


def _bind(node: onnx.NodeProto, info: AttentionNode) -> None:
    names = ",".join(spec.name for spec in op.OUTPUTS[: len(info.outputs)])
    wanted = {**op.PLUGIN_ATTRIBUTES, OUTPUTS_ATTRIBUTE: names}
    kept = [attribute for attribute in node.attribute if attribute.name not in wanted]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in wanted.items())


def _additive(mask: str, name: str, elem_type: int) -> list[onnx.NodeProto]:
    """`Where(mask, 0, lowest)`, with constants of the node's type."""

    def scalar(label: str, value: float) -> onnx.NodeProto:
        dtype = helper.tensor_dtype_to_np_dtype(elem_type)
        tensor = onnx.numpy_helper.from_array(np.asarray(value, dtype=np.float32).astype(dtype), f"{name}_{label}")
        return helper.make_node("Constant", [], [tensor.name], f"{name}_{label}", value=tensor)

    select = helper.make_node("Where", [mask, f"{name}_zero", f"{name}_lowest"], [name], name)
    return [scalar("zero", 0.0), scalar("lowest", LOWEST[elem_type]), select]
