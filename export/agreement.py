"""Inputs that must agree: a graph refuses one whose size contradicts the others, in any runtime and by name.

A runtime checks no symbolic dimension. An `attention_mask` that is not as long as past and sequence together would fail
far behind, in words about something else, or pass unnoticed.
"""

from __future__ import annotations

import onnx_ir as ir

from export.adapter import Signature

_SUM = " + "


def require_agreement(model: ir.Model, signature: Signature) -> None:
    """Leads every input with a dimension like "past + sequence" through a Reshape to what the other inputs say.

    Args:
        model: the traced graph of `signature`, changed in place.
        signature: names the dimensions; those with a sum in them are checked.
    """
    inputs = dict(zip(signature.examples, model.graph.inputs, strict=True))
    sources = {
        dimension: (inputs[name], axis)
        for name, axes in reversed(signature.dynamic.items())
        for axis, dimension in axes.items()
        if not any(_SUM in other for other in axes.values())
    }
    for name, axes in signature.dynamic.items():
        if any(_SUM in dimension for dimension in axes.values()):
            _lead_through_reshape(model.graph, inputs[name], name, axes, sources)


def _lead_through_reshape(
    graph: ir.Graph, value: ir.Value, name: str, axes: dict[int, str], sources: dict[str, tuple[ir.Value, int]]
) -> None:
    tape = ir.tape.Tape()
    sizes = []
    for axis in sorted(axes):
        terms = []
        for dimension in axes[axis].split(_SUM):
            source, where = sources[dimension]
            terms.append(tape.op("Shape", [source], {"start": where, "end": where + 1}))
        size = terms[0]
        for term in terms[1:]:
            size = tape.op("Add", [size, term])
        sizes.append(size)
    shape = tape.op("Concat", sizes, {"axis": 0})
    # runtimes name the node that failed: the name is the message
    message = f"{name} must have the shape [{', '.join(axes[axis] for axis in sorted(axes))}]"
    agreed = tape.op("Reshape", [value, shape], name=message)
    agreed.name, agreed.type, agreed.shape = f"{name}.agreed", value.type, value.shape
    ir.convenience.replace_all_uses_with(value, agreed)
    reshape = agreed.producer()
    assert reshape is not None
    reshape.replace_input_with(0, value)
    graph.insert_before(graph[0], tape.nodes)
