"""Rewrite: put the op in the place of a checked attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from export import op
from export.function_body import LOWEST
from export.rewrite.check import Plan
from export.rewrite.masks import Leaf
from export.rewrite.match import Operand
from export.rewrite.shapes import Shapes
from sparse_attention.patterns import ResolvedAttention


@dataclass
class Written:
    """What one model's rewriting has written so far.

    `masks`: masks already in the op's form, so that the layers of a model share one. `outputs`: what took the place of
    an attention's output, because a later attention may take it as its q, K or V.
    """

    masks: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)
    outputs: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def current(self, operand: Operand) -> Operand:
        return operand._replace(value=self.outputs.get(operand.value, operand.value))


class Writer:
    """Creates nodes in front of an anchor; they carry the metadata of the attention they belong to."""

    def __init__(self, anchor: ir.Node, metadata: dict[str, str]) -> None:
        self.anchor, self.metadata = anchor, metadata

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, metadata_props=dict(self.metadata))
        self.insert(node)
        return node.outputs[0]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        return self("Constant", value=ir.tensor(np.asarray(value, dtype=dtype)))

    def insert(self, node: ir.Node) -> None:
        graph = self.anchor.graph
        assert graph is not None
        graph.insert_before(self.anchor, node)


def replace(
    plan: Plan, resolved: ResolvedAttention, shapes: Shapes, written: Written, *, unit: str, name: str
) -> ir.Node:
    """Write the op's node and hand its output to whoever used the attention's; the old nodes stay, unused.

    Every attribute of the contract is written, and `PLUGIN_ATTRIBUTES`; the node takes the metadata of the attention's
    Softmax or Attention node, and the output keeps its name.
    """
    match = plan.match
    anchor = match.output.producer()
    assert anchor is not None
    write = Writer(anchor, dict(match.root.metadata_props))
    inputs = {
        "q": _to_heads(write, written.current(match.q), plan, 0),
        "k": _to_heads(write, written.current(plan.k), plan, 1),
        "v": _to_heads(write, written.current(plan.v), plan, 1),
    }
    bias = _bias(write, plan, shapes, written.masks)
    if bias is not None:
        inputs["bias"] = bias
    if match.kv_lengths is not None:
        inputs["kv_lengths"] = write("Cast", match.kv_lengths, to=ir.DataType.INT32)
        if match.is_causal:
            rows = write("Cast", write("Shape", inputs["q"], start=2, end=3), to=ir.DataType.INT32)
            inputs["q_start"] = write("Sub", inputs["kv_lengths"], rows)
    elif plan.q_start is not None:
        batch = write("Shape", inputs["q"], start=0, end=1)
        inputs["q_start"] = write("Expand", write.constant([plan.q_start], np.int32), batch)
    _set_types(inputs, plan)
    names = op.input_names(list(inputs))
    attributes = op.attributes(
        inputs=",".join(names), br=resolved.br, bc=resolved.bc, is_causal=int(plan.is_causal), scale=match.scale,
        softcap=match.softcap, window=plan.masks.window, unit=unit, **resolved.thresholds.attributes(),
    )  # fmt: skip
    node = ir.node(
        op.OP_TYPE,
        [inputs[key] for key in names],
        {**attributes, **op.PLUGIN_ATTRIBUTES},
        domain=op.DOMAIN,
        name=name,
        metadata_props=dict(match.root.metadata_props),
    )
    write.insert(node)
    written.outputs[match.output] = _hand_over(match.output, _from_heads(write, node.outputs[0], plan))
    return node


def _set_types(inputs: dict[str, ir.Value], plan: Plan) -> None:
    """The types of values just written, which nothing has inferred yet."""
    types = dict.fromkeys(("q", "k", "v"), plan.dtype)
    types["bias"] = plan.dtype if plan.masks.added else ir.DataType.BOOL
    for name, value in inputs.items():
        if value.dtype is None:
            value.dtype = types.get(name, ir.DataType.INT32)
    heads = plan.match.heads if plan.match.layout in ("NSD", "BSE") else (1, 1)
    for name, count in zip(("q", "k", "v"), (heads[0], heads[1], heads[1]), strict=True):
        if inputs[name].shape is None and plan.match.layout != "BHSD":
            inputs[name].shape = ir.Shape([None, count, None, None])


def _to_heads(write: Writer, operand: Operand, plan: Plan, which: int) -> ir.Value:
    """q, K or V as `[B, H, S, D]`; `which` is 0 for q and 1 for K and V."""
    value, match = operand.value, plan.match
    if operand.perm is not None:
        source = value.shape
        value = write("Transpose", value, perm=operand.perm)
        value.shape = None if source is None else ir.Shape([source[axis] for axis in operand.perm])
    if match.layout == "SD":
        return write("Unsqueeze", value, write.constant([0, 1]))
    if match.layout == "NSD":
        return _split_heads(write, value, match.heads[0])
    if match.layout == "BSE":
        split = write("Reshape", value, write.constant([0, 0, match.heads[which], -1]))
        return write("Transpose", split, perm=(0, 2, 1, 3))
    return value


def _split_heads(write: Writer, value: ir.Value, heads: int) -> ir.Value:
    """`[B*H, ...]` as `[B, H, ...]`."""
    if heads == 1:
        return write("Unsqueeze", value, write.constant([1]))
    shape = write("Concat", write.constant([-1, heads]), write("Shape", value, start=1), axis=0)
    return write("Reshape", value, shape)


def _from_heads(write: Writer, o: ir.Value, plan: Plan) -> ir.Value:
    """The op's output in the layout of the attention's."""
    match = plan.match
    if match.layout == "SD":
        return write("Squeeze", o, write.constant([0, 1]))
    if match.layout == "NSD":
        shape = write("Concat", write.constant([-1]), write("Shape", o, start=2), axis=0)
        return write("Reshape", o, shape)
    if match.layout == "BSE":
        return write("Reshape", write("Transpose", o, perm=(0, 2, 1, 3)), write.constant([0, 0, -1]))
    return o


def _bias(write: Writer, plan: Plan, shapes: Shapes, shared: dict[tuple[object, ...], ir.Value]) -> ir.Value | None:
    """What is left of the masks as one input: a Boolean where nothing is added, else a tensor of q's type."""
    seen, added = plan.masks.seen, plan.masks.added
    if not seen and not added:
        return None
    heads = plan.match.heads[0]
    key = (tuple(seen), tuple(added), plan.dtype, heads, write.anchor.graph)
    if key not in shared:
        masks = [_rank_4(write, _visible(write, leaf), leaf, shapes, heads) for leaf in seen]
        biases = [_rank_4(write, _scaled(write, leaf, plan.dtype), leaf, shapes, heads) for leaf in added]
        visible = _chain(write, "And", masks) if masks else None
        bias = _chain(write, "Add", biases) if biases else None
        if bias is None:
            assert visible is not None
            shared[key] = visible
        elif visible is None:
            shared[key] = bias
        else:
            lowest = write.constant(LOWEST[plan.dtype], plan.dtype.numpy())
            shared[key] = write("Where", visible, bias, lowest)
    return shared[key]


def _visible(write: Writer, leaf: Leaf) -> ir.Value:
    value = leaf.value
    if value.dtype not in (ir.DataType.BOOL, None):
        value = write("Cast", value, to=ir.DataType.BOOL)
    return write("Not", value) if leaf.hides else value


def _scaled(write: Writer, leaf: Leaf, dtype: ir.DataType) -> ir.Value:
    return leaf.value if leaf.factor == 1.0 else write("Mul", leaf.value, write.constant(leaf.factor, dtype.numpy()))


def _rank_4(write: Writer, value: ir.Value, leaf: Leaf, shapes: Shapes, heads: int) -> ir.Value:
    """A mask as `[B|1, H|1, Sq|1, Sk|1]`."""
    shape = shapes.shape(leaf.value)
    assert shape is not None  # checked
    if leaf.merged and len(shape) == 3 and shape[0].constant != 1:
        return _split_heads(write, value, heads)
    return value if len(shape) == 4 else write("Unsqueeze", value, write.constant(list(range(4 - len(shape)))))


def _chain(write: Writer, op_type: str, values: Sequence[ir.Value]) -> ir.Value:
    result = values[0]
    for value in values[1:]:
        result = write(op_type, result, value)
    return result


def _hand_over(old: ir.Value, new: ir.Value) -> ir.Value:
    """`new` takes the place, name, type and shape of `old`."""
    new.type, new.shape = old.type, old.shape
    new.metadata_props.update(old.metadata_props)
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = f"{name}_before_rewriting"
    new.name = name
    return new


def remove_unused(nodes: Iterable[ir.Node]) -> None:
    """Remove the given nodes, whatever only they used, and the initializers that are left over."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        graph = node.graph
        if graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        for value in inputs:
            above = value.producer()
            if above is not None:
                waiting.append(above)
            elif value.is_initializer() and not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                owner = value.graph
                if owner is not None and value.name is not None:
                    owner.initializers.pop(value.name, None)
