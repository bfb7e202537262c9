"""Graphs of nothing but op nodes, made portable by `finish` and run in two independent runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator

from export import op
from export.finish import finish
from export.runners import as_numpy, session
from tests.attention_calls import Call

DTYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16,
    torch.bool: ir.DataType.BOOL, torch.int32: ir.DataType.INT32,
}  # fmt: skip
RUNTIMES = ("onnxruntime", "onnx.reference")
CUDA = "onnxruntime on CUDA"


def graph_of(calls: Sequence[Call], *, opset: int = 23, scopes: Sequence[str] = ()) -> ir.Model:
    """A graph as tracing leaves it: node i computes call i from inputs `i.q`, `i.k`, ... to the output `i.o`.

    Optional inputs are told by position, as PyTorch's exporter writes them.
    """
    inputs, outputs, nodes = [], [], []
    for number, call in enumerate(calls):
        given = {}
        for name, tensor in call.tensors.items():
            shape = ir.Shape([None] * tensor.dim() if name != "q" else [None, tensor.shape[1], None, tensor.shape[3]])
            value = ir.Value(name=f"{number}.{name}", type=ir.TensorType(DTYPES[tensor.dtype]), shape=shape)
            given[name] = value
            inputs.append(value)
        written = {name: int(value) if isinstance(value, bool) else value for name, value in call.attributes().items()}
        node = ir.node(
            op.OP_TYPE, [given.get(spec.name) for spec in op.INPUTS], written, domain=op.DOMAIN, num_outputs=2
        )
        node.outputs[0].name = f"{number}.o"
        node.outputs[0].type = given["q"].type
        node.outputs[0].shape = ir.Shape([None, None, None, None])
        if scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = str(["", f"adapted.{scopes[number]}", "op"])
        node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/someone/model.py", line 3'
        nodes.append(node)
        outputs.append(node.outputs[0])
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": opset, op.DOMAIN: op.VERSION}, name="calls")
    return ir.Model(graph, ir_version=10)


def finished(calls: Sequence[Call], *, opset: int = 23, **options: Any) -> onnx.ModelProto:
    """The portable graph of these calls."""
    return ir.to_proto(finish(graph_of(calls, opset=opset), **options))


def feeds(calls: Sequence[Call]) -> dict[str, np.ndarray]:
    """The graph's inputs for these calls."""
    return {f"{number}.{name}": as_numpy(tensor) for number, call in enumerate(calls)
            for name, tensor in call.tensors.items()}  # fmt: skip


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray], runtime: str) -> dict[str, torch.Tensor]:
    """The graph's outputs by name, in ONNX Runtime on the CPU or on CUDA, or in onnx's own evaluator."""
    names = [output.name for output in model.graph.output]
    if runtime == "onnxruntime":
        values = session(model.SerializeToString()).run(names, feed)
    elif runtime == CUDA:
        # by default it computes products of float32 in TF32, whose ten bits may decide a tile otherwise
        providers = [("CUDAExecutionProvider", {"use_tf32": "0"})]
        there = onnxruntime.InferenceSession(model.SerializeToString(), providers=providers)
        assert there.get_providers()[0] == "CUDAExecutionProvider"
        values = there.run(names, feed)
    else:
        values = ReferenceEvaluator(model).run(names, feed)
    return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, values, strict=True)}
