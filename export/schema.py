"""The op's ONNX schema, made from the contract: by it the exporter knows the op's inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnx import defs

from export import op

_OPTION = defs.OpSchema.FormalParameterOption
_KINDS = {
    "int": defs.OpSchema.AttrType.INT,
    "float": defs.OpSchema.AttrType.FLOAT,
    "string": defs.OpSchema.AttrType.STRING,
}


def _parameter(spec: op.TensorSpec) -> defs.OpSchema.FormalParameter:
    kind = "TBias" if spec.name == "bias" else spec.types[0]
    option = _OPTION.Single if spec.required else _OPTION.Optional
    return defs.OpSchema.FormalParameter(spec.name, kind, spec.doc, param_option=option)


def schema() -> defs.OpSchema:
    """Version 1 of the op as an ONNX schema."""
    return defs.OpSchema(
        op.OP_TYPE,
        op.DOMAIN,
        op.VERSION,
        doc="Block-skip softmax attention: tiles far below the running maximum skip their softmax and product with V.",
        inputs=[_parameter(spec) for spec in op.INPUTS],
        outputs=[_parameter(spec) for spec in op.OUTPUTS],
        type_constraints=[
            ("T", list(op.FLOATS), "dtype of q, k, v and o"),
            ("TBias", [*op.FLOATS, "tensor(bool)"], "an additive bias has T, a mask is boolean"),
        ],
        attributes=[
            *(defs.OpSchema.Attribute(a.name, _KINDS[a.kind], a.doc, required=False) for a in op.ATTRIBUTES),
            *(defs.OpSchema.Attribute(name, _KINDS["string"], "", required=False) for name in op.PLUGIN_ATTRIBUTES),
        ],
    )


@contextmanager
def registered() -> Iterator[None]:
    """Makes the schema known to `onnx` inside the block.

    Only the exporter needs it. A finished node leaves out the inputs it does not have (its `inputs` attribute names the
    others), which a schema by position cannot describe: checkers then go by the function body.
    """
    defs.register_schema(schema())
    try:
        yield
    finally:
        defs.deregister_schema(op.OP_TYPE, op.VERSION, op.DOMAIN)
