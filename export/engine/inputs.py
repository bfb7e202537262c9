"""Inputs to run a model on where nobody gave any: deterministic, by what their names say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto, helper

from export.engine.model import ExportedModel, TensorInfo

VOCABULARY = 1000
"""Ids below it exist in every tokenizer we know."""


def example_inputs(
    tensors: Sequence[TensorInfo], shapes: Mapping[str, Sequence[int]], *, vocabulary: int = VOCABULARY
) -> dict[str, np.ndarray]:
    """One array per input at the given shape: positions count up, masks are full, ids vary, floats are normal."""
    return {t.name: _example(t.name, t.elem_type, shapes[t.name], vocabulary) for t in tensors}


def vocabulary_of(model: ExportedModel) -> int:
    """How many ids the model's embedding has, at most VOCABULARY: the rows that a Gather takes by an input."""
    rows = {tensor.name: tensor.dims[0] for tensor in model.proto.graph.initializer if len(tensor.dims) == 2}
    names = {tensor.name for tensor in model.inputs}
    gathers = [node.input for node in model.proto.graph.node if node.op_type == "Gather"]
    return min([VOCABULARY, *(rows[data] for data, ids in gathers if data in rows and ids in names)])


def _example(name: str, elem_type: int, shape: Sequence[int], vocabulary: int) -> np.ndarray:
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    generator = np.random.default_rng(0)
    if np.issubdtype(dtype, np.integer):
        if "position" in name:
            return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
        if "mask" in name:
            return np.ones(shape, dtype)
        return generator.integers(0, vocabulary, shape).astype(dtype)
    if elem_type == TensorProto.BOOL or name == "threshold_scale":
        return np.ones(shape, dtype)
    return generator.standard_normal(shape).astype(dtype)
