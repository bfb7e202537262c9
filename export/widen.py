"""The widened twin of a bfloat16 file: the same graph in float32, for runtimes that compute no bfloat16."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from export.finish import attach_body

_BFLOAT16, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def widened_twin(path: Path) -> bytes:
    """The file at `path` with every bfloat16 weight, input and cast in float32, serialized, weights included.

    Widening is exact for the weights; activations are then rounded to float32 instead of bfloat16. At most 2 GiB.
    """
    model = ir.load(path)
    graph = model.graph
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == _BFLOAT16:
            value.const_value = ir.tensor(_widened(tensor.numpy()), name=value.name)
            value.dtype = _FLOAT
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(_widened(attribute.as_tensor().numpy())))
            if node.op_type in ("Cast", "CastLike") and name == "to" and attribute.as_int() == _BFLOAT16:
                node.attributes[name] = ir.AttrInt64(name, _FLOAT)
        for value in node.outputs:
            _retype(value)
    for value in graph.inputs:
        _retype(value)
    attach_body(model)
    return ir.to_proto(model).SerializeToString()


def _widened(array: np.ndarray) -> np.ndarray:
    return array.view(ml_dtypes.bfloat16).astype(np.float32) if array.dtype != np.float32 else array


def _retype(value: ir.Value) -> None:
    if value.dtype == _BFLOAT16:
        value.dtype = _FLOAT
