"""The op in onnx-graphsurgeon: rewriting its graphs, and users' surgery on the result."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrite_helpers import PREFIX, feeds, graph, run, settings

from export import op
from export.rewrite.graphsurgeon import rewrite_graph
from export.runners import session

gs = pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is an optional dependency")


def test_a_graph_goes_in_and_comes_out() -> None:
    model = graph(f"{PREFIX} p = Softmax(x) y = MatMul(p, v) o = Relu(y)")
    data = feeds(model, rows=16, columns=16)
    data["k"][:, :, 4:12] *= 0.01
    data["q"][..., 0], data["k"][:, :, :4, 0] = 8.0, 8.0
    dense = run(model, data)[0]
    rewritten, report = rewrite_graph(gs.import_onnx(ir.to_proto(model)), settings(0.1))
    assert [entry.site.node_name for entry in report.rewritten] == ["Softmax_4"]
    (node,) = (node for node in rewritten.nodes if node.op == op.OP_TYPE)
    assert node.domain == op.DOMAIN
    assert set(node.attrs) == {spec.name for spec in op.ATTRIBUTES} | {*op.PLUGIN_ATTRIBUTES, op.OUTPUTS_ATTRIBUTE}
    assert node.attrs["prefill_threshold"] == pytest.approx(0.1)

    node.attrs["prefill_threshold"] = 0.0  # a user's own surgery
    rewritten.cleanup().toposort()
    proto = gs.export_onnx(rewritten)
    onnx.checker.check_model(proto, full_check=True)
    assert [function.name for function in proto.functions] == [op.OP_TYPE]
    np.testing.assert_allclose(session(proto.SerializeToString()).run(None, data)[0], dense, atol=1e-5)
    node.attrs["prefill_threshold"] = 0.1
    sparse = session(gs.export_onnx(rewritten).SerializeToString()).run(None, data)[0]
    assert not np.allclose(sparse, dense, atol=1e-6), "nothing was skipped"


def test_a_graph_without_attention_is_returned_as_it_is() -> None:
    model = graph("o = Identity(q)")
    rewritten, report = rewrite_graph(gs.import_onnx(ir.to_proto(model)), settings())
    assert [node.op for node in rewritten.nodes] == ["Identity"] and report.counts["found"] == 0
