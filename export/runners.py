"""Running an exported graph, whole or one attention node at a time, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from export import op
from export.finish import METADATA, op_nodes
from export.function_body import EXISTS, GAP, KEPT, Features, function_body
from sparse_attention.errors import MissingError, ModelError

_OPSET_OF_TWIN = 18


def session(model: str | bytes, weights: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU, from a path, or from bytes with weights in the folder `weights`.

    Raises:
        MissingError: where ONNX Runtime is not installed.
        ModelError: where it cannot load the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError("ONNX Runtime is not installed", fix="pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds, without a base of their own
        raise ModelError(
            "ONNX Runtime cannot load the model", where=model if isinstance(model, str) else str(weights or ""),
            found=str(error).splitlines()[0],
            fix="keep its .data file beside it; its CPU has no bfloat16: export with --dtype float32 or float16",
        ) from error  # fmt: skip


def read_graph(path: Path) -> ir.Model:
    """Reads an exported file (weights stay on disk) and makes sure that it holds our op in a version we know.

    Raises:
        MissingError: where the file does not exist.
        ModelError: where it is not ONNX, holds no block-skip attention, or another version of the op.
    """
    if not path.is_file():
        raise MissingError("there is no such file", where=str(path), fix="export it first")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf raises its own kinds
        raise ModelError("the file cannot be read as ONNX", where=str(path), found=str(error)[:120],
                         fix="export it again") from error  # fmt: skip
    nodes = op_nodes(model)
    version = model.graph.opset_imports.get(op.DOMAIN, op.VERSION)
    if not nodes:
        raise ModelError("the file holds no block-skip attention", where=str(path),
                         found=f"{len(list(model.graph))} other nodes",
                         fix="pass a file that `sparse-attention export` wrote")  # fmt: skip
    if version != op.VERSION:
        raise ModelError("unknown version of the op", where=str(path), found=f"{op.DOMAIN} {version}",
                         fix=f"this program knows version {op.VERSION}: export again, or upgrade")  # fmt: skip
    return model


def metadata(model: ir.Model, key: str) -> Any:
    """A value that the export wrote into the model's metadata; None where it is not there."""
    import json

    text = model.metadata_props.get(f"{METADATA}.{key}")
    return None if text is None else json.loads(text)


class NodeRunner:
    """One attention node of an exported file by itself, with the tile decisions of its body as extra outputs.

    The body is the file's own function. ONNX Runtime computes no bfloat16 product on a CPU: a bfloat16 node runs as its
    widened twin, the same body generated for float32.
    """

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.name = node.name or ""
        self.inputs = node.attributes["inputs"].as_string().split(",")
        self.attributes = {spec.name: node.attributes[spec.name].value for spec in op.ATTRIBUTES}
        q = node.inputs[0]
        self._dtype = (q.dtype if q is not None else None) or ir.DataType.FLOAT
        self.widened = self._dtype == ir.DataType.BFLOAT16
        self._session = session(self._single_node(model, node).SerializeToString())
        self._types = {one.name: one.type for one in self._session.get_inputs()}

    def _single_node(self, model: ir.Model, node: ir.Node) -> onnx.ModelProto:
        function = ir.to_proto(model.functions[node.op_identifier()])
        bias = next((v.dtype for n, v in zip(self.inputs, node.inputs, strict=True) if n == "bias" and v), None)
        element = self._dtype.value
        if self.widened:
            element = onnx.TensorProto.FLOAT
            function = ir.to_proto(self._twin(bias == ir.DataType.BOOL))
        function.output[:] = ["o", GAP, EXISTS, KEPT]
        types = {spec.name: element for spec in op.INPUTS} | {
            "kv_lengths": onnx.TensorProto.INT32, "q_start": onnx.TensorProto.INT32,
            "q_lengths": onnx.TensorProto.INT32, "threshold_scale": onnx.TensorProto.FLOAT,
            "bias": onnx.TensorProto.BOOL if bias == ir.DataType.BOOL else element,
        }  # fmt: skip
        ranks = {spec.name: len(spec.shape) for spec in op.INPUTS}
        helper = onnx.helper
        outputs = {
            "o": element,
            GAP: onnx.TensorProto.FLOAT,
            EXISTS: onnx.TensorProto.BOOL,
            KEPT: onnx.TensorProto.BOOL,
        }
        single = helper.make_node(op.OP_TYPE, self.inputs, list(outputs), domain=op.DOMAIN)
        single.attribute.extend(helper.make_attribute(name, value) for name, value in self.attributes.items())
        graph = helper.make_graph(
            [single],
            "node",
            [helper.make_tensor_value_info(n, types[n], [None] * ranks[n]) for n in self.inputs],
            [helper.make_tensor_value_info(n, kind, [None] * 4) for n, kind in outputs.items()],
        )
        opsets = [helper.make_opsetid(o.domain, o.version) for o in function.opset_import]
        opsets.append(helper.make_opsetid(op.DOMAIN, op.VERSION))
        return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=model.ir_version)

    def _twin(self, bool_bias: bool) -> ir.Function:
        has = self.attributes
        features = Features(
            tuple(self.inputs), causal=bool(has["is_causal"]), window=bool(has["window"]), softcap=bool(has["softcap"]),
            calibrated=bool(has["prefill_a"] or has["decode_a"]), group=has["unit"] == "group", bool_bias=bool_bias,
        )  # fmt: skip
        return function_body(features, _OPSET_OF_TWIN)

    def __call__(self, given: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Runs the node; inputs by the contract's names, None or left out for the default.

        Returns `o [B, Hq, Sq, Dv]` and `tile_gap`, `tile_exists`, `tile_kept` `[B, Hq, R, C]`.
        """
        q, k = given["q"], given["k"]
        assert q is not None and k is not None
        feed = {}
        for name in self.inputs:
            value = given.get(name)
            value = (
                default_input(name, q, k, bool_bias=self._types.get("bias") == "tensor(bool)")
                if value is None
                else value
            )
            feed[name] = as_numpy(value)
        names = ["o", GAP, EXISTS, KEPT]
        return {n: torch.from_numpy(x) for n, x in zip(names, self._session.run(names, feed), strict=True)}


def as_numpy(value: Tensor) -> np.ndarray:
    """A tensor as ONNX Runtime takes it; bfloat16 is widened to float32, which is exact."""
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def default_input(name: str, q: Tensor, k: Tensor, *, bool_bias: bool) -> Tensor:
    """What an optional input means where it is not given."""
    batch, heads, rows, columns = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if name == "bias":
        return torch.ones(1, 1, 1, 1, dtype=torch.bool) if bool_bias else q.new_zeros(1, 1, 1, 1)
    if name == "sinks":
        return q.new_full((heads,), float("-inf"))
    if name == "threshold_scale":
        return torch.ones(1)
    length = {"kv_lengths": columns, "q_start": columns - rows, "q_lengths": rows}[name]
    return torch.full((batch,), length, dtype=torch.int32)
