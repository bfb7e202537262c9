"""PyTorch to ONNX: traces a sparsified model; every attention becomes one op node."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import values

from export import op, schema
from export.adapter import Signature
from export.agreement import require_agreement
from sparse_attention.attention import OP
from sparse_attention.errors import ModelError

_OPSET = values.Opset(op.DOMAIN, op.VERSION)


def _translate(
    q: Any, k: Any, v: Any, bias: Any = None, kv_lengths: Any = None, q_start: Any = None, q_lengths: Any = None,
    sinks: Any = None, threshold_scale: Any = None, is_causal: bool = False, **attributes: Any,
) -> Any:  # fmt: skip
    """The PyTorch op as the ONNX op: same names, same order; a bool is an int there."""
    return _OPSET.BlockSkipSoftmaxAttention(
        q, k, v, bias, kv_lengths, q_start, q_lengths, sinks, threshold_scale, is_causal=int(is_causal), **attributes
    )


def trace(signature: Signature, *, opset: int = 23) -> ir.Model:
    """Exports `signature.module` with the names and dynamic dimensions that the signature gives.

    Raises:
        ModelError: where the exporter fails, with its reason.
    """
    module = signature.module.eval()
    inputs = tuple(signature.examples.values())
    dynamic = _dynamic_shapes(signature)
    with schema.registered(), _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module, inputs, dynamo=True, opset_version=opset, dynamic_shapes=(dynamic,),
                input_names=list(signature.examples), output_names=list(signature.outputs),
                custom_translation_table={OP: _translate}, verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            cause = error.__cause__ or error
            raise ModelError(
                "PyTorch cannot export this model", where=type(module.model).__name__,
                found=f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}",
                fix="try it with torch.export first; dense export of the same model fails alike",
            ) from error  # fmt: skip
    assert program is not None
    _name_dimensions(program.model, signature)
    require_agreement(program.model, signature)
    return program.model


def _dynamic_shapes(signature: Signature) -> tuple[dict[int, Any] | None, ...]:
    """The dynamic dimensions as the exporter takes them: one symbol a name, so that no two have to be proven equal.

    A name with an operator in it ("past + sequence") is worked out by the exporter from the others.
    """
    names = {name for axes in signature.dynamic.values() for name in axes.values()}
    symbols = {name: torch.export.Dim(name) if name.isidentifier() else torch.export.Dim.DYNAMIC for name in names}
    return tuple(
        {axis: symbols[name] for axis, name in signature.dynamic.get(given, {}).items()} or None
        for given in signature.examples
    )


def _name_dimensions(model: ir.Model, signature: Signature) -> None:
    """Gives the dimensions that the exporter worked out itself (it calls them `s22`) the names of the signature."""
    names: dict[str, str] = {}
    for value, given_name in zip(model.graph.inputs, signature.examples, strict=True):
        for axis, name in signature.dynamic.get(given_name, {}).items():
            given = value.shape[axis] if value.shape is not None else None
            if isinstance(given, ir.SymbolicDim) and given.value is not None and given.value != name:
                names[given.value] = name
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for shape in (value.shape for value in values if names and value.shape is not None):
        for axis, dimension in enumerate(shape):
            if isinstance(dimension, ir.SymbolicDim) and dimension.value in names and not shape.frozen:
                shape[axis] = names[dimension.value]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns of its own future; neither is for our users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
