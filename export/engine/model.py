"""An exported model as the engine builder sees it: its inputs, its block-skip nodes, and why it may not build."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from export import op
from export.finish import METADATA
from sparse_attention.errors import MissingError, ModelError, UsageError

Dim = int | str
"""A dimension: its size, or its name, or "" where the model says nothing."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, ONNX element type and dimensions; `dims` is None where even the rank is unknown."""

    name: str
    elem_type: int
    dims: tuple[Dim, ...] | None

    @property
    def type_name(self) -> str:
        """The element type as ONNX writes it, for example FLOAT16."""
        return str(TensorProto.DataType.Name(self.elem_type))


@dataclass(frozen=True)
class AttentionNode:
    """One block-skip node: its inputs by the contract's names, its attributes, its number of outputs."""

    name: str
    inputs: Mapping[str, TensorInfo]
    attributes: Mapping[str, int | float | str]
    outputs: tuple[str, ...]

    @property
    def has_counts(self) -> bool:
        return len(self.outputs) == len(op.OUTPUTS)


@dataclass(frozen=True)
class ExportedModel:
    """A model read for building: `proto` is without its external data, which stays beside `path`; `recorded` is what
    the export wrote into its metadata (config, unit, signature), without what it did not."""

    path: Path
    proto: onnx.ModelProto = field(repr=False)
    inputs: tuple[TensorInfo, ...]
    nodes: tuple[AttentionNode, ...]
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Of the attention, as PyTorch calls it; "float32" where the graph does not tell."""
        names: dict[int, str] = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
        return names.get(self.nodes[0].inputs["q"].elem_type, "float32")

    @property
    def exported(self) -> dict[str, Any]:
        """How the graph was made of a PyTorch model, for a check against that one."""
        return {
            "dtype": self.dtype,
            "unit": self.recorded.get("unit", "head"),
            "signature": self.recorded.get("signature"),
        }


def read_model(path: Path) -> ExportedModel:
    """Reads the graph of an `.onnx`; weights stored beside it are not loaded.

    Raises MissingError where there is no such file, ModelError where it is no ONNX model, UsageError where it holds
    no block-skip node or one of another version.
    """
    if not path.is_file():
        raise MissingError("There is no such model.", where=str(path), fix="Give the path of an exported .onnx file.")
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf's own exception classes are private and differ between its versions
        raise ModelError(
            "The file is not a readable ONNX model.", where=str(path), found=str(error).splitlines()[0],
            fix="Export the model again; a download or copy may have been cut off.",
        ) from error  # fmt: skip
    if not proto.graph.node:
        raise ModelError("The model has no nodes.", where=str(path), fix="Export the model again.")
    known = _known_tensors(proto.graph)
    nodes = tuple(_attention_node(node, known) for node in walk_nodes(proto.graph) if is_attention(node))
    _check_versions(path, proto, nodes)
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(_tensor_info(value) for value in proto.graph.input if value.name not in constants)
    return ExportedModel(path, proto, inputs, nodes, _recorded(proto))


def _recorded(proto: onnx.ModelProto) -> dict[str, Any]:
    values = {p.key.removeprefix(f"{METADATA}."): p.value for p in proto.metadata_props}
    return {key: json.loads(values[key]) for key in ("config", "unit", "signature") if key in values}


def walk_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of the graph and of the bodies of its If, Loop and Scan nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from walk_nodes(body)


def is_attention(node: onnx.NodeProto) -> bool:
    return node.domain == op.DOMAIN and node.op_type == op.OP_TYPE


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim)
    return TensorInfo(value.name, tensor.elem_type, dims if tensor.HasField("shape") else None)


def _known_tensors(graph: onnx.GraphProto) -> dict[str, TensorInfo]:
    known = {info.name: info for info in map(_tensor_info, [*graph.input, *graph.value_info, *graph.output])}
    for tensor in graph.initializer:
        known[tensor.name] = TensorInfo(tensor.name, tensor.data_type, tuple(tensor.dims))
    return known


def _attention_node(node: onnx.NodeProto, known: Mapping[str, TensorInfo]) -> AttentionNode:
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    names = str(attributes.get("inputs", "q,k,v")).split(",")
    if len(names) != len(node.input):
        raise ModelError(
            f"A node names {len(names)} inputs and has {len(node.input)}.", where=f"node {node.name}, attribute inputs",
            found=f"{','.join(names)!r} for inputs {list(node.input)}", fix="Export the model again.",
        )  # fmt: skip
    unknown = TensorInfo("", TensorProto.UNDEFINED, None)
    inputs = {name: known.get(value, unknown) for name, value in zip(names, node.input, strict=True)}
    return AttentionNode(node.name, inputs, attributes, tuple(node.output))


def _check_versions(path: Path, proto: onnx.ModelProto, nodes: tuple[AttentionNode, ...]) -> None:
    if not nodes:
        raise UsageError(
            f"The model has no {op.OP_TYPE} node, so an engine of it would skip nothing.", where=str(path),
            found=f"operator domains {sorted({e.domain or 'ai.onnx' for e in proto.opset_import})}",
            fix="Make one with `sparse-attention export MODEL -o out.onnx`, which also accepts an existing .onnx.",
        )  # fmt: skip
    version = next((e.version for e in proto.opset_import if e.domain == op.DOMAIN), None)
    if version != op.VERSION:
        raise UsageError(
            f"The model uses another version of the op than the plugin has ({op.VERSION}).", where=str(path),
            found=f"opset_import of domain {op.DOMAIN!r}: {version}",
            fix="Export the model again with this version of the package, or install the version that exported it.",
        )  # fmt: skip
    for node in nodes:
        found = str(node.attributes.get("plugin_version", op.VERSION))
        if found != str(op.VERSION):
            raise UsageError(
                "A node asks for another version of the plugin.", where=f"node {node.name}, attribute plugin_version",
                found=repr(found), fix=f"Export the model again: the plugin has version {op.VERSION!r}.",
            )  # fmt: skip
