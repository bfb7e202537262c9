"""Whether the plugin's kernels serve every node at every profile: asked of the library before a long build."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from onnx import TensorProto

from export import op
from export.engine.model import AttentionNode, Dim, ExportedModel, TensorInfo
from export.engine.plugin import BUILD, PluginLibrary, open_library
from export.engine.shapes import Profile, evaluate
from sparse_attention.errors import UsageError

_FIELD_FLOAT32, _FIELD_INT32, _FIELD_CHAR = 1, 5, 6
_TYPES: Mapping[int, int] = {
    TensorProto.FLOAT: 0, TensorProto.FLOAT16: 1, TensorProto.INT32: 3, TensorProto.BOOL: 4, TensorProto.BFLOAT16: 7,
}  # fmt: skip
"""nvinfer1::DataType of an ONNX element type."""


class _Field(ctypes.Structure):
    """nvinfer1::PluginField."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class _Fields(ctypes.Structure):
    """nvinfer1::PluginFieldCollection."""

    _fields_ = (("count", ctypes.c_int32), ("fields", ctypes.POINTER(_Field)))


class _Tensor(ctypes.Structure):
    """nvinfer1::PluginTensorDesc: Dims64, type, format (0 = linear), scale."""

    _fields_ = (
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


def require_kernels(model: ExportedModel, profiles: Sequence[Profile], plugin: PluginLibrary) -> int:
    """Asks for every node at the smallest, best and largest shapes of every profile; returns the number of answers.

    Raises UsageError with the first node no kernel serves. A node whose shapes the model does not tell is not asked
    about: TensorRT will.
    """
    answers = 0
    for node, profile in product(model.nodes, profiles):
        for which in range(3):
            sizes = _sizes(model.inputs, profile, which)
            shapes = _shapes(node, sizes)
            if shapes is None:
                continue
            answers += 1
            reason = why_not(plugin, node.attributes, [t.elem_type for t in node.inputs.values()], shapes)
            if reason:
                raise UsageError(
                    "The plugin has no kernel for a node of the model.",
                    where=f"node {node.name}, profile {profile.name}",
                    found=reason,
                    fix=_fix(reason),
                )
    return answers


def _fix(reason: str) -> str:
    """In the words of the kernel library: another GPU, another build of the library, or another export."""
    if "compute capability" in reason:
        return "Build the engine on a GPU of an architecture that the kernels were built for."
    if "left out" in reason:
        return f"Build the plugin with all its kernels: `{BUILD}`."
    return "Export the model again with what the kernels have (the reason names it), or change --shapes."


def why_not(
    plugin: PluginLibrary,
    attributes: Mapping[str, int | float | str],
    types: Iterable[int],
    shapes: Sequence[Sequence[int]],
) -> str:
    """The reason why no kernel serves a node with these inputs, "" where one does."""
    kept = [attributes[spec.name] for spec in op.ATTRIBUTES if spec.name in attributes]
    names = [spec.name for spec in op.ATTRIBUTES if spec.name in attributes]
    values = [_value(value) for value in kept]
    fields = (_Field * len(values))(*[
        _Field(name.encode(), ctypes.cast(pointer, ctypes.c_void_p), kind, length)
        for name, (pointer, kind, length) in zip(names, values, strict=True)
    ])  # fmt: skip
    tensors = (_Tensor * len(shapes))(*[
        _Tensor(len(shape), (ctypes.c_int64 * 8)(*shape), _TYPES.get(kind, -1), 0, 1.0)
        for kind, shape in zip(types, shapes, strict=True)
    ])  # fmt: skip
    reason = ctypes.create_string_buffer(1024)
    function = open_library(plugin.path).blockskipSupports
    function.restype = ctypes.c_int32
    function.argtypes = (
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_size_t
    )  # fmt: skip
    collection = _Fields(len(values), fields)
    supported = function(ctypes.byref(collection), tensors, len(shapes), reason, len(reason))
    return "" if supported else reason.value.decode()


def _value(value: int | float | str) -> tuple[Any, int, int]:
    match value:
        case int():
            return ctypes.pointer(ctypes.c_int32(value)), _FIELD_INT32, 1
        case float():
            return ctypes.pointer(ctypes.c_float(value)), _FIELD_FLOAT32, 1
    text = ctypes.create_string_buffer(value.encode())
    return text, _FIELD_CHAR, len(value.encode())


def _sizes(inputs: Sequence[TensorInfo], profile: Profile, which: int) -> dict[str, int]:
    """The sizes of the named dimensions at the smallest (0), best (1) or largest (2) shapes."""
    sizes: dict[str, int] = {}
    for tensor in inputs:
        for dim, size in zip(tensor.dims or (), profile.inputs[tensor.name][which], strict=True):
            if isinstance(dim, str):
                sizes[dim] = size
    return sizes


def _shapes(node: AttentionNode, sizes: Mapping[str, int]) -> list[list[int]] | None:
    shapes = []
    for tensor in node.inputs.values():
        if tensor.dims is None or "" in tensor.dims or tensor.elem_type == TensorProto.UNDEFINED:
            return None
        try:
            shapes.append([_size(dim, sizes) for dim in tensor.dims])
        except (UsageError, SyntaxError):
            return None
    return shapes


def _size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """An expression that is an input's dimension is looked up whole: its parts need not be known."""
    return sizes[dim] if isinstance(dim, str) and dim in sizes else evaluate(dim, sizes)
