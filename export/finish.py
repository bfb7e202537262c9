"""A traced or rewritten graph made portable: uniform op nodes, the function body, the extras, no local traces.

Every optional input that some node has, all nodes get (neutral where they had none), because inputs that are left out
of a model-local function are not portable between runtimes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from export import op
from export.adapter import ADAPTED
from export.function_body import Features, function_body
from sparse_attention.errors import ModelError

METADATA = "block_skip_attention"
"""Prefix of the model's metadata keys: `.config`, `.versions`."""

SCOPES = "pkg.torch.onnx.name_scopes"
_KEPT_METADATA = (SCOPES, "pkg.torch.onnx.class_hierarchy")


def op_nodes(model: ir.Model) -> list[ir.Node]:
    """All nodes of our op, in graph order."""
    return [node for node in model.graph if node.domain == op.DOMAIN and node.op_type == op.OP_TYPE]


def node_inputs(node: ir.Node) -> dict[str, ir.Value]:
    """The node's inputs by name, whether they are told by its `inputs` attribute or still by position."""
    named = node.attributes.get("inputs")
    names = named.as_string().split(",") if named is not None else [spec.name for spec in op.INPUTS]
    return {name: value for name, value in zip(names, node.inputs, strict=False) if value is not None}


def finish(
    model: ir.Model, *, tunable: bool = False, counts: bool = False, metadata: Mapping[str, Any] | None = None
) -> ir.Model:
    """Completes the op nodes of `model`, in place, and returns it.

    Args:
        model: a graph that holds op nodes with attributes of the contract.
        tunable: adds the graph input `threshold_scale` (float32 `[1]`), which multiplies every λ.
        counts: adds the graph output `tile_counts` (int32 `[layers, Hq, 2]`; one output a layer where heads differ).
        metadata: values for the model's metadata, written as JSON under `block_skip_attention.<key>`.

    Raises:
        ModelError: where the graph holds no op node, or nodes that one function body cannot serve.
    """
    nodes = op_nodes(model)
    if not nodes:
        raise ModelError("the graph holds no block-skip attention", fix="check which modules the patterns match")
    for number, node in enumerate(nodes):
        node.name = _name(node, number)
    inputs = [node_inputs(node) for node in nodes]
    if tunable:
        scale = ir.Value(name="threshold_scale", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
        model.graph.inputs.append(scale)
        inputs = [{**one, "threshold_scale": scale} for one in inputs]
    _fill_in(model.graph, nodes, inputs)
    features = _features(nodes, inputs, counts)
    replaced: dict[ir.Value, ir.Value] = {}  # the output of one attention may be an input of the next
    for number, node in enumerate(nodes):
        given = {name: replaced.get(value, value) for name, value in inputs[number].items()}
        nodes[number] = _complete(model.graph, node, given, features)
        replaced[node.outputs[0]] = nodes[number].outputs[0]
    if counts:
        _add_counts(model.graph, nodes)
    passes.RemoveUnusedNodesPass()(model)
    attach_body(model)  # last: parity looks at values inside the body that nothing in it uses
    _strip(model)
    for key, value in (metadata or {}).items():
        model.metadata_props[f"{METADATA}.{key}"] = json.dumps(value)
    return model


def attach_body(model: ir.Model) -> None:
    """Gives the model the function body that its finished op nodes need, in place of any it has."""
    nodes = op_nodes(model)
    features = _features(nodes, [node_inputs(node) for node in nodes], counts=len(nodes[0].outputs) > 1)
    model.graph.opset_imports[op.DOMAIN] = op.VERSION
    body = function_body(features, model.graph.opset_imports[""])
    model.functions[body.identifier()] = body


def module_scope(node: ir.Node) -> str:
    """Dotted name of the PyTorch module that the node was traced from, "" where the graph does not say."""
    scopes = node.metadata_props.get(SCOPES)
    if not scopes:
        return ""
    names = [name.strip().strip("'\"") for name in scopes.strip("[]").split(",")]
    name = names[-2] if len(names) > 1 else ""
    return name.removeprefix(f"{ADAPTED}.")


def _name(node: ir.Node, number: int) -> str:
    scope = module_scope(node)
    return f"{scope or f'attention_{number}'}.{op.OP_TYPE}"


def _fill_in(graph: ir.Graph, nodes: list[ir.Node], inputs: list[dict[str, ir.Value]]) -> None:
    """Gives every node the inputs that any node has; a node that had none gets one without effect."""
    present = {name for one in inputs for name in one}
    mixed = {one["bias"].dtype for one in inputs if "bias" in one}
    for node, given in zip(nodes, inputs, strict=True):
        tape = ir.tape.Tape()
        if ir.DataType.BOOL in mixed and len(mixed) > 1 and given.get("bias") is not None:
            given["bias"] = _additive(tape, given["bias"], given["q"].dtype)
        for name in present - set(given):
            given[name] = _neutral(tape, name, given, bool_bias=mixed == {ir.DataType.BOOL})
        graph.insert_before(node, tape.nodes)


def _constant(tape: ir.tape.Tape, value: Any, dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(np.asarray(value, dtype=np.float32 if dtype.is_floating_point() else None), dtype=None)
    constant = tape.op("Constant", [], {"value": tensor})
    return tape.op("Cast", [constant], {"to": dtype}) if tensor.dtype != dtype else constant


def _additive(tape: ir.tape.Tape, mask: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    assert dtype is not None
    if mask.dtype != ir.DataType.BOOL:
        return mask
    zero, hidden = _constant(tape, 0.0, dtype), _constant(tape, -np.inf, dtype)
    return tape.op("Where", [mask, zero, hidden])


def _neutral(tape: ir.tape.Tape, name: str, given: dict[str, ir.Value], *, bool_bias: bool) -> ir.Value:
    """An input that changes nothing, in the shape that the contract wants."""
    dtype = given["q"].dtype or ir.DataType.FLOAT
    dimension = {key: tape.op("Shape", [given[key[0]]], {"start": int(key[1]), "end": int(key[1]) + 1})
                 for key in ("q0", "q1", "q2", "k2")}  # fmt: skip
    if name == "bias":
        if bool_bias:
            return _constant(tape, np.ones((1, 1, 1, 1), dtype=bool), ir.DataType.BOOL)
        return _constant(tape, np.zeros((1, 1, 1, 1)), dtype)
    if name == "threshold_scale":
        return _constant(tape, np.ones(1), ir.DataType.FLOAT)
    if name == "sinks":
        return tape.op("Expand", [_constant(tape, -np.inf, dtype), dimension["q1"]])
    length = {
        "kv_lengths": dimension["k2"],
        "q_lengths": dimension["q2"],
        "q_start": tape.op("Sub", [dimension["k2"], dimension["q2"]]),
    }[name]
    return tape.op("Expand", [tape.op("Cast", [length], {"to": ir.DataType.INT32}), dimension["q0"]])


def _features(nodes: list[ir.Node], inputs: list[dict[str, ir.Value]], counts: bool) -> Features:
    def some(name: str) -> bool:
        return any(name in node.attributes and node.attributes[name].value for node in nodes)

    units = {node.attributes["unit"].as_string() if "unit" in node.attributes else "head" for node in nodes}
    dtypes = {one["q"].dtype for one in inputs}
    if len(units) > 1 or len(dtypes) > 1 or None in dtypes:
        raise ModelError(
            "the attention nodes of one model must share their dtype and unit", found=f"{dtypes}, {units}",
            fix="export the whole model in one dtype, with one unit",
        )  # fmt: skip
    return Features(
        inputs=op.input_names(list(inputs[0])),
        dtype=dtypes.pop() or ir.DataType.FLOAT,
        causal=some("is_causal"),
        window=some("window"),
        softcap=some("softcap"),
        calibrated=some("prefill_a") or some("decode_a"),
        group=units == {"group"},
        bool_bias=any("bias" in one and one["bias"].dtype == ir.DataType.BOOL for one in inputs),
        counts=counts,
        heads=_shared(inputs, "q", 1),
        kv_heads=_shared(inputs, "k", 1),
        size=_shared(inputs, "q", 3),
        v_size=_shared(inputs, "v", 3),
    )


def _shared(inputs: list[dict[str, ir.Value]], name: str, axis: int) -> int | None:
    """The dimension that this input has in every node; None where it differs or is dynamic."""
    shapes = [one[name].shape for one in inputs]
    sizes = {shape[axis] if shape is not None else None for shape in shapes}
    size = sizes.pop()
    return size if not sizes and isinstance(size, int) else None


def _complete(graph: ir.Graph, node: ir.Node, inputs: dict[str, ir.Value], features: Features) -> ir.Node:
    """Replaces `node` by one with every attribute, the inputs in order, and the wanted outputs only."""
    given = {spec.name: node.attributes[spec.name].value for spec in op.ATTRIBUTES if spec.name in node.attributes}
    written = op.attributes(**given) | {"inputs": ",".join(features.inputs)} | dict(op.PLUGIN_ATTRIBUTES)
    written[op.OUTPUTS_ATTRIBUTE] = "o,counts" if features.counts else "o"
    kinds = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}
    complete = ir.Node(
        op.DOMAIN, op.OP_TYPE, [inputs[name] for name in features.inputs],
        [ir.Attr(name, kinds[type(value)], value) for name, value in written.items()],
        num_outputs=2 if features.counts else 1, name=node.name, metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    out, new = node.outputs[0], complete.outputs[0]
    new.name, new.type, new.shape = out.name, out.type, out.shape
    graph.insert_before(node, [complete])
    ir.convenience.replace_all_uses_with(out, new, replace_graph_outputs=True)
    if features.counts:
        heads = inputs["q"].shape[1] if inputs["q"].shape is not None else None
        complete.outputs[1].name = f"{node.name}.counts"
        complete.outputs[1].type = ir.TensorType(ir.DataType.INT32)
        complete.outputs[1].shape = ir.Shape([heads, 2])
    graph.remove(node, safe=True)
    return complete


def _add_counts(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    values = [node.outputs[1] for node in nodes]
    heads = {value.shape[0] if value.shape is not None else None for value in values}
    if len(heads) > 1:
        graph.outputs.extend(values)
        return
    tape = ir.tape.Tape()
    axis = _constant(tape, np.array([0]), ir.DataType.INT64)
    rows = [tape.op("Unsqueeze", [value, axis]) for value in values]
    stacked = tape.op("Concat", rows, {"axis": 0})
    stacked.name, stacked.type = "tile_counts", ir.TensorType(ir.DataType.INT32)
    stacked.shape = ir.Shape([len(nodes), *heads, 2])
    graph.extend(tape.nodes)
    graph.outputs.append(stacked)


def _strip(model: ir.Model) -> None:
    """Removes what tells of the machine the model was exported on, stack traces with paths above all."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for key in [key for key in node.metadata_props if key not in _KEPT_METADATA]:
            del node.metadata_props[key]
        node.doc_string = None
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.doc_string = None
