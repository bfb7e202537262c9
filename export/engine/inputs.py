"""Inputs to run a model on where nobody gave any: deterministic, by what their names say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto, helper

from export.engine.model import TensorInfo

_VOCABULARY = 1000  # ids below it exist in every tokenizer we know


def example_inputs(tensors: Sequence[TensorInfo], shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """One array per input at the given shape: positions count up, masks are full, ids vary, floats are normal."""
    return {tensor.name: _example(tensor.name, tensor.elem_type, shapes[tensor.name]) for tensor in tensors}


def _example(name: str, elem_type: int, shape: Sequence[int]) -> np.ndarray:
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    generator = np.random.default_rng(0)
    if np.issubdtype(dtype, np.integer):
        if "position" in name:
            return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
        if "mask" in name:
            return np.ones(shape, dtype)
        return generator.integers(0, _VOCABULARY, shape).astype(dtype)
    if elem_type == TensorProto.BOOL or name == "threshold_scale":
        return np.ones(shape, dtype)
    return generator.standard_normal(shape).astype(dtype)
