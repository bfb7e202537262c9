"""The contract as data, against everything that carries the op: PyTorch's schema, the function body, ONNX's schema."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from onnx import defs

from export import op, schema
from export.function_body import Features, function_body
from sparse_attention.attention import OP, block_skip_attention
from sparse_attention.threshold import Thresholds
from tests.attention_calls import peaky_call

INPUTS = [
    ("q", "T", ("B", "Hq", "Sq", "D"), True),
    ("k", "T", ("B", "Hk", "Sk", "D"), True),
    ("v", "T", ("B", "Hk", "Sk", "Dv"), True),
    ("bias", "T", ("B|1", "Hq|1", "Sq|1", "Sk|1"), False),
    ("kv_lengths", "tensor(int32)", ("B",), False),
    ("q_start", "tensor(int32)", ("B",), False),
    ("q_lengths", "tensor(int32)", ("B",), False),
    ("sinks", "T", ("Hq",), False),
    ("threshold_scale", "tensor(float)", (1,), False),
]
ATTRIBUTES = {
    "inputs": ("string", "q,k,v"), "br": ("int", 128), "bc": ("int", 128), "is_causal": ("int", 0),
    "scale": ("float", 1.0), "softcap": ("float", 0.0), "window": ("int", 0), "unit": ("string", "head"),
    **{f"{phase}_{name}": ("float", 0.0) for phase in ("prefill", "decode")
       for name in ("threshold", "a", "b", "target")},
}  # fmt: skip
OF_GRAPHS_ONLY = {"inputs"}  # PyTorch tells its optional inputs by position


def test_version_1_is_frozen() -> None:
    """Files in the world hold these names: a change is another version of the op."""
    assert (op.DOMAIN, op.OP_TYPE, op.VERSION) == ("blockskip", "BlockSkipSoftmaxAttention", 1)
    assert [(spec.name, spec.types[0], spec.shape, spec.required) for spec in op.INPUTS] == INPUTS
    assert [(spec.name, spec.shape, spec.required) for spec in op.OUTPUTS] == [
        ("o", ("B", "Hq", "Sq", "Dv"), True), ("counts", ("Hq", 2), False)
    ]  # fmt: skip
    assert {spec.name: (spec.kind, spec.default) for spec in op.ATTRIBUTES} == ATTRIBUTES
    assert dict(op.PLUGIN_ATTRIBUTES) == {"plugin_namespace": "blockskip", "plugin_version": "1"}


def test_torch_schema() -> None:
    """Same inputs in the same order, same attributes, same outputs."""
    arguments = OP._schema.arguments
    tensors = [one for one in arguments if not one.kwarg_only]
    assert [one.name for one in tensors] == [spec.name for spec in op.INPUTS]
    assert [isinstance(one.type, torch.TensorType) for one in tensors] == [spec.required for spec in op.INPUTS]
    kinds = {"int": {"int", "bool", "SymInt"}, "float": {"float"}, "string": {"str"}}
    numbers = {one.name: str(one.type) for one in arguments if one.kwarg_only}
    expected = {spec.name: spec.kind for spec in op.ATTRIBUTES if spec.name not in OF_GRAPHS_ONLY}
    assert numbers.keys() == expected.keys()
    assert all(numbers[name] in kinds[kind] for name, kind in expected.items())
    assert [one.name for one in OP._schema.returns] == [spec.name for spec in op.OUTPUTS]


def test_python_function_takes_every_input() -> None:
    import inspect

    names = set(inspect.signature(block_skip_attention).parameters)
    assert {spec.name for spec in op.INPUTS} <= names
    assert {"br", "bc", "is_causal", "scale", "softcap", "window", "unit", "threshold", "return_stats"} <= names


def test_threshold_attributes_are_those_of_the_configuration() -> None:
    of_phases = {spec.name for spec in op.ATTRIBUTES if spec.name.startswith(op.PHASES)}
    assert set(Thresholds().attributes()) == of_phases


@pytest.mark.parametrize("inputs", [("q", "k", "v"), tuple(spec.name for spec in op.INPUTS)])
@pytest.mark.parametrize("counts", [False, True])
def test_function_body(inputs: tuple[str, ...], counts: bool) -> None:
    body = function_body(Features(inputs, causal=True, window=True, counts=counts), 23)
    assert (body.domain, body.name, body.overload) == (op.DOMAIN, op.OP_TYPE, "")
    assert [value.name for value in body.inputs] == list(inputs)
    outputs = [spec.name for spec in op.OUTPUTS if spec.required or counts]
    assert [value.name for value in body.outputs] == outputs
    assert list(body.attributes) == [spec.name for spec in op.ATTRIBUTES]
    assert all(node.domain == "" for node in body)  # standard operators only
    proto = ir.to_proto(body)
    assert {one.domain: one.version for one in proto.opset_import} == {"": 23}
    for node in proto.node:
        assert defs.has(node.op_type, 23), node.op_type


def test_function_body_holds_no_number_of_a_node() -> None:
    """Everything that differs between nodes is read from the node's attributes, each from the one it is named after."""
    body = function_body(
        Features(tuple(s.name for s in op.INPUTS), causal=True, window=True, softcap=True, calibrated=True), 23
    )
    references = {
        attribute.ref_attr_name for node in body for attribute in node.attributes.values() if attribute.is_ref()
    }
    not_read = {"inputs", "unit"}  # shape the body itself
    assert references == {spec.name for spec in op.ATTRIBUTES} - not_read


def test_onnx_schema() -> None:
    found = schema.schema()
    assert (found.domain, found.name, found.since_version) == (op.DOMAIN, op.OP_TYPE, op.VERSION)
    assert [one.name for one in found.inputs] == [spec.name for spec in op.INPUTS]
    optional = defs.OpSchema.FormalParameterOption.Optional
    assert [one.option != optional for one in found.inputs] == [spec.required for spec in op.INPUTS]
    assert [one.name for one in found.outputs] == [spec.name for spec in op.OUTPUTS]
    attributes = {name: one.type.name.lower() for name, one in found.attributes.items()}
    assert attributes == {s.name: s.kind for s in op.ATTRIBUTES} | dict.fromkeys(op.PLUGIN_ATTRIBUTES, "string")
    types = {one.type_param_str: set(one.allowed_type_strs) for one in found.type_constraints}
    assert types["T"] == set(op.FLOATS) and types["TBias"] == {*op.FLOATS, "tensor(bool)"}


def test_onnx_schema_does_not_outlive_the_export() -> None:
    assert not defs.has(op.OP_TYPE, op.DOMAIN)
    with schema.registered():
        assert defs.get_schema(op.OP_TYPE, op.VERSION, op.DOMAIN).name == op.OP_TYPE
    assert not defs.has(op.OP_TYPE, op.DOMAIN)
    with pytest.raises(RuntimeError), schema.registered():
        raise RuntimeError
    assert not defs.has(op.OP_TYPE, op.DOMAIN)


def test_node_attributes_are_complete_and_checked() -> None:
    written = op.attributes(br=64, scale=0.125)
    assert list(written) == list(ATTRIBUTES) and written["br"] == 64 and written["bc"] == 128
    with pytest.raises(ValueError, match="rows"):
        op.attributes(rows=1)
    assert op.input_names(["sinks", "v", "q", "k"]) == ("q", "k", "v", "sinks")
    with pytest.raises(ValueError, match=r"unknown \['mask'\], missing \['v'\]"):
        op.input_names(["q", "k", "mask"])


def test_torch_op_refuses_what_the_contract_does_not_name() -> None:
    call = peaky_call(3, 4)
    with pytest.raises((TypeError, RuntimeError), match="argument"):
        OP(*call.qkv, None, None, None, None, None, None, **call.attributes(), rows=1)
