"""Small graphs from ONNX text, the op's body on them, and runs in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from export import op
from export.finish import finish
from export.rewrite import RewriteReport, rewrite_attention
from sparse_attention.patterns import ResolvedAttention
from sparse_attention.threshold import Thresholds

SHAPES = {"q": "[B,4,S,8]", "k": "[B,4,T,8]", "v": "[B,4,T,8]"}
PREFIX = "kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) c = Constant<value_float=0.35>() x = Mul(s, c)"


def graph(body: str, *, opset: int = 18, output: str = "float[B,4,S,8] o", **inputs: str) -> ir.Model:
    """A model from ONNX text; `inputs` are added to q, k and v, as name="type[shape]"."""
    types = {name: f"float{shape}" for name, shape in SHAPES.items()} | inputs
    arguments = ", ".join(f"{kind} {name}" for name, kind in types.items())
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({arguments}) => ({output}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for number, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{number}"
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def settings(threshold: float = 0.0, br: int = 4, bc: int = 4):  # type: ignore[no-untyped-def]
    """The same configuration for every attention."""
    resolved = ResolvedAttention(True, Thresholds.of(threshold), br=br, bc=bc)
    return lambda site: resolved


def rewritten(model: ir.Model, threshold: float = 0.0, **options: int) -> RewriteReport:
    return rewrite_attention(model, settings(threshold, **options))


def op_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.domain == op.DOMAIN]


def attribute(model: ir.Model, name: str):  # type: ignore[no-untyped-def]
    (node,) = op_nodes(model)
    return node.attributes[name].value


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs in ONNX Runtime, the op's function body attached where the op occurs."""
    model = model.clone()
    if op_nodes(model):
        finish(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def feeds(model: ir.Model, *, rows: int = 11, columns: int = 11, seed: int = 0) -> dict[str, np.ndarray]:
    """Peaky float inputs of two batches; Boolean inputs see three keys of four and always the first."""
    rng = np.random.default_rng(seed)
    sizes = {"B": 2, "S": rows, "T": columns, "N": 8}
    result = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes[dim.value] for dim in value.shape]
        if value.dtype == ir.DataType.BOOL:
            array = rng.random(shape) < 0.75
            array[..., 0] = True
        elif value.dtype == ir.DataType.INT64:
            array = np.full(shape, columns - 3, dtype=np.int64)
        else:
            array = (3 * rng.standard_normal(shape)).astype(value.dtype.numpy())
        result[value.name] = array
    return result


def assert_same_when_dense(
    model: ir.Model, *, rows: int = 11, columns: int = 11, tolerance: float = 1e-5
) -> RewriteReport:
    """Rewrite at λ = 0 and compare with the graph as it was; return the report."""
    data = feeds(model, rows=rows, columns=columns)
    expected = run(model, data)
    report = rewritten(model)
    assert report.rewritten and not report.left, str(report)
    found = run(model, data)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)
    return report
