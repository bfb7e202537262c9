"""Which configuration reaches which attention, by module, by class and by node name."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from rewrite_helpers import PREFIX, graph, op_nodes

from export.rewrite import RewriteReport, find_attention
from export.rewrite_file import rewrite
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.errors import ConfigError, ModelError

TWO = f"{PREFIX} p = Softmax(x) y = MatMul(p, v) s2 = MatMul(q, kt) x2 = Mul(s2, c) p2 = Softmax(x2) o = MatMul(p2, y)"


def two_layers(*, named: bool = True) -> ir.Model:
    model = graph(TWO)
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    for layer, node in enumerate(softmaxes if named else []):
        scopes = ["", "adapted", f"adapted.layers.{layer}", f"adapted.layers.{layer}.mix", "softmax"]
        node.metadata_props["pkg.torch.onnx.name_scopes"] = str(scopes)
        node.metadata_props["pkg.torch.onnx.class_hierarchy"] = "['W', 'a.Model', 'a.Layer', 'a.MyAttention', 'aten']"
    return model


def config(**patterns: dict[str, object]) -> SparseAttentionConfig:
    return SparseAttentionConfig(sparse_cfg={key.replace("_", "*"): value for key, value in patterns.items()})


def rewritten(model: ir.Model, given: SparseAttentionConfig) -> RewriteReport:
    return rewrite(model, given)[0]


def test_each_layer_gets_its_own_configuration() -> None:
    model = two_layers()
    given = config(_attention_={"threshold": 0.1, "br": 16}, **{"layers.1._": {"threshold": 0.2}})
    report = rewritten(model, given)
    assert [entry.site.module for entry in report.rewritten] == ["layers.0.mix", "layers.1.mix"]
    found = [(node.attributes["prefill_threshold"].value, node.attributes["br"].value) for node in op_nodes(model)]
    assert found == [(pytest.approx(0.1), 16), (pytest.approx(0.2), 16)]


def test_a_layer_that_no_pattern_matches_stays_dense() -> None:
    model = two_layers()
    report = rewritten(model, config(**{"layers.0._": {"threshold": 0.1}}))
    assert [entry.site.module for entry in report.rewritten] == ["layers.0.mix"]
    assert [(entry.site.module, entry.reason) for entry in report.left] == [
        ("layers.1.mix", "the configuration leaves it dense")
    ]
    assert [node.op_type for node in model.graph].count("Softmax") == 1


def test_a_file_without_modules_is_matched_by_node_name() -> None:
    model = two_layers(named=False)
    assert [site.module for site in find_attention(model)] == ["Softmax_4", "Softmax_8"]
    report = rewritten(model, config(_8={"threshold": 0.1}))
    assert [entry.site.node_name for entry in report.rewritten] == ["Softmax_8"]


def test_a_pattern_that_matches_nothing_lists_the_attentions() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.mix"):
        rewritten(two_layers(), config(encoder_={"threshold": 0.1}))


def test_a_graph_without_attention_is_an_error() -> None:
    with pytest.raises(ModelError, match="attention"):
        rewritten(graph("o = Identity(q)"), config(_={"threshold": 0.1}))


def test_causality_set_against_the_graph_is_an_error() -> None:
    model = two_layers()
    before = len(list(model.graph))
    with pytest.raises(ConfigError, match="contradicts the model about causality") as error:
        rewritten(model, config(_={"threshold": 0.1, "is_causal": True}))
    assert error.value.where == "layers.0.mix"
    assert len(list(model.graph)) == before


def test_attention_inside_a_branch_is_left_with_the_reason() -> None:
    model = graph(
        "yes = Constant<value = bool {1}>() o = If(yes) <then_branch = a () => (float[B,4,S,8] t) "
        "{ kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) p = Softmax(s) t = MatMul(p, v) }, "
        "else_branch = b () => (float[B,4,S,8] e) { e = Identity(q) }>"
    )
    with pytest.raises(ModelError, match="inside the branch of a control-flow operator"):
        rewritten(model, config(_={"threshold": 0.1}))
