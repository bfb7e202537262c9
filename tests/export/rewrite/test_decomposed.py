"""Attention written out in MatMul and Softmax: what is rewritten, to the same numbers, and what is left and why."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import pytest
from rewrite_helpers import PREFIX, assert_same_when_dense, attribute, feeds, graph, op_nodes, rewritten, run

from export import op
from sparse_attention.errors import ModelError

CONSTANT = "c = Constant<value_float=0.35>()"
SPELLINGS = {
    "scale on scores": f"kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) {CONSTANT} x = Mul(s, c)",
    "scale first": f"kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) {CONSTANT} x = Mul(c, s)",
    "scale by Div": "kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) c = Constant<value_float=2.857142857>() "
    "x = Div(s, c)",
    "scale on q": f"kt = Transpose<perm=[0,1,3,2]>(k) {CONSTANT} a = Mul(q, c) x = MatMul(a, kt)",
    "scale on k": f"{CONSTANT} a = Mul(k, c) kt = Transpose<perm=[0,1,3,2]>(a) x = MatMul(q, kt)",
    "scale on both": "c = Constant<value_float=0.591607978>() kt = Transpose<perm=[0,1,3,2]>(k) a = Mul(kt, c) "
    "b = Mul(q, c) x = MatMul(b, a)",
    "scale from the head size": "kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) d = Shape<start=-1>(q) "
    "f = Cast<to=1>(d) r = Sqrt(f) x = Div(s, r)",
    "einsum": f'{CONSTANT} s = Einsum<equation="bhid,bhjd->bhij">(q, k) x = Mul(s, c)',
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_the_scale(spelling: str) -> None:
    model = graph(f"{SPELLINGS[spelling]} p = Softmax<axis=-1>(x) o = MatMul(p, v)")
    assert_same_when_dense(model, rows=7)
    expected = 8**-0.5 if "head size" in spelling else 0.35
    assert attribute(model, "scale") == pytest.approx(expected, rel=1e-6)


def test_k_transposed_by_three_nodes() -> None:
    model = graph(
        "n = Shape(k) d = Slice(n, three, four) t = Slice(n, two, three) bh = Slice(n, zero, two) "
        "flat = Concat<axis=0>(minus, t, d) a = Reshape(k, flat) b = Transpose<perm=[0,2,1]>(a) "
        "full = Concat<axis=0>(bh, d, t) kt = Reshape(b, full) x = MatMul(q, kt) "
        "p = Softmax(x) o = MatMul(p, v)".replace(
            "n = Shape(k)",
            "zero = Constant<value_ints=[0]>() two = Constant<value_ints=[2]>() three = Constant<value_ints=[3]>() "
            "four = Constant<value_ints=[4]>() minus = Constant<value_ints=[-1]>() n = Shape(k)",
        )
    )
    assert_same_when_dense(model)
    assert op_nodes(model)[0].inputs[1] is model.graph.inputs[1]
    assert len(list(model.graph)) == 1


def test_softcap_dropout_cast_and_nan_guard() -> None:
    model = graph(
        f"{PREFIX} cap = Constant<value_float=5.0>() d = Div(x, cap) t = Tanh(d) y = Mul(t, cap) "
        "e = Cast<to=1>(y) p = Softmax(e) r = Dropout(p) z = Constant<value_float=0.0>() n = IsNaN(r) "
        "w = Where(n, z, r) o = MatMul(w, v)"
    )
    assert_same_when_dense(model)
    assert attribute(model, "softcap") == pytest.approx(5.0)
    assert attribute(model, "scale") == pytest.approx(0.35)


def test_softcap_times_a_factor_is_folded_into_the_scale() -> None:
    model = graph(
        f"{PREFIX} f = Constant<value_float=0.5>() d = Mul(x, f) t = Tanh(d) cap = Constant<value_float=3.0>() "
        "y = Mul(cap, t) p = Softmax(y) o = MatMul(p, v)"
    )
    assert_same_when_dense(model)
    assert (attribute(model, "softcap"), attribute(model, "scale")) == pytest.approx((3.0, 3.0 * 0.5 * 0.35))


@pytest.mark.parametrize("side", ["m = Add(x, bias)", "m = Add(bias, x)"])
def test_a_bias_stays_a_bias(side: str) -> None:
    model = graph(f"{PREFIX} {side} p = Softmax(m) o = MatMul(p, v)", bias="float[4,S,T]")
    report = assert_same_when_dense(model, rows=5)
    assert report.rewritten[0].inputs == ("q", "k", "v", "bias") and not report.rewritten[0].is_causal


@pytest.mark.parametrize("choice", ["Where(mask, x, low)", "Where(hide, low, x)"])
def test_a_boolean_mask_stays_a_mask(choice: str) -> None:
    model = graph(
        f"{PREFIX} low = Constant<value_float=-1e9>() hide = Not(mask) m = {choice} p = Softmax(m) o = MatMul(p, v)",
        mask="bool[B,1,1,T]",
    )
    assert_same_when_dense(model)
    assert attribute(model, "inputs") == "q,k,v,bias"


def test_mask_and_bias_become_one_input() -> None:
    model = graph(
        f"{PREFIX} low = Constant<value_float=-3.4e38>() b = Add(x, bias) m = Where(mask, b, low) p = Softmax(m) "
        "o = MatMul(p, v)",
        mask="bool[B,1,1,T]",
        bias="float[1,4,S,T]",
    )
    assert_same_when_dense(model)


def test_merged_heads_and_their_mask() -> None:
    model = graph(
        "kt = Transpose<perm=[0,2,1]>(k) c = Constant<value_float=0.35>() s = MatMul(q, kt) x = Mul(s, c) "
        "m = Add(bias, x) p = Softmax(m) o = MatMul(p, v)",
        output="float[N,S,8] o",
        q="float[N,S,8]",
        k="float[N,T,8]",
        v="float[N,T,8]",
        bias="float[N,1,T]",
    )
    assert_same_when_dense(model, rows=6)


def test_merged_heads_are_split_where_the_graph_tells_how_many() -> None:
    model = graph(
        "shape = Constant<value_ints=[0,-1,8]>() qs = Reshape(q, shape) ks = Reshape(k, shape) vs = Reshape(v, shape) "
        "qt = Transpose<perm=[1,0,2]>(qs) kt = Transpose<perm=[1,2,0]>(ks) vt = Transpose<perm=[1,0,2]>(vs) "
        "x = MatMul(qt, kt) p = Softmax(x) o = MatMul(p, vt)",
        output="float[M,S,8] o",
        q="float[S,B,32]",
        k="float[T,B,32]",
        v="float[T,B,32]",
    )
    assert_same_when_dense(model, rows=6)
    reshape = op_nodes(model)[0].inputs[0].producer()
    assert reshape.op_type == "Reshape"
    assert reshape.inputs[1].producer().inputs[0].producer().attributes["value"].value.numpy().tolist() == [-1, 4]


def test_scores_reshaped_to_four_dimensions_for_the_mask() -> None:
    model = graph(
        "kt = Transpose<perm=[0,2,1]>(k) s = MatMul(q, kt) n = Shape<start=1>(s) h = Constant<value_ints=[-1,4]>() "
        "four = Concat<axis=0>(h, n) s4 = Reshape(s, four) low = Constant<value_float=-1e9>() m = Where(mask, s4, low) "
        "one = Constant<value_ints=[-1]>() three = Concat<axis=0>(one, n) m3 = Reshape(m, three) p = Softmax(m3) "
        "o = MatMul(p, v)",
        output="float[N,S,8] o",
        q="float[N,S,8]",
        k="float[N,T,8]",
        v="float[N,T,8]",
        mask="bool[B,1,1,T]",
    )
    assert_same_when_dense(model, rows=6)


def test_one_head_without_batch_by_gemm() -> None:
    model = graph(
        "s = Gemm<transB=1, alpha=0.35>(q, k) p = Softmax(s) o = Gemm(p, v)",
        output="float[S,8] o",
        q="float[S,8]",
        k="float[T,8]",
        v="float[T,8]",
    )
    assert_same_when_dense(model, rows=3)


def test_half_precision_with_a_float32_softmax() -> None:
    model = graph(
        "kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) w = Cast<to=1>(s) p = Softmax(w) h = Cast<to=10>(p) "
        "o = MatMul(h, v)",
        output="float16[B,4,S,8] o",
        q="float16[B,4,S,8]",
        k="float16[B,4,T,8]",
        v="float16[B,4,T,8]",
    )
    assert_same_when_dense(model, tolerance=5e-3)


def test_an_attention_that_feeds_the_next_one() -> None:
    first = PREFIX + " p = Softmax(x) y = MatMul(p, v)"
    second = "s2 = MatMul(q, kt) x2 = Mul(s2, c) p2 = Softmax(x2) o = MatMul(p2, y)"
    model = graph(f"{first} {second}")
    report = assert_same_when_dense(model)
    assert report.counts == {"found": 2, "rewritten": 2, "left": 0, "decomposed": 2}


def test_layers_that_differ_in_their_masks() -> None:
    first = f"{PREFIX} p = Softmax(x) y = MatMul(p, v)"
    second = "m = Add(x, bias) p2 = Softmax(m) w = MatMul(p2, y)"
    third = "low = Constant<value_float=-1e9>() m3 = Where(mask, x, low) p3 = Softmax(m3) o = MatMul(p3, w)"
    model = graph(f"{first} {second} {third}", bias="float[1,4,S,T]", mask="bool[B,1,1,T]")
    report = assert_same_when_dense(model)
    assert [entry.inputs[3:] for entry in report.rewritten] == [(), ("bias",), ("bias",)]


def test_the_node_carries_the_whole_contract() -> None:
    model = graph(f"{PREFIX} p = Softmax(x) o = MatMul(p, v)")
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layers.0', 'layers.0.attn', 'softmax']"
        node.metadata_props["pkg.torch.onnx.class_hierarchy"] = "['M', 'Layer', 'my.Attention', 'aten.softmax']"
    report = rewritten(model, 0.25, br=8, bc=16)
    (node,) = op_nodes(model)
    attributes = {name: entry.value for name, entry in node.attributes.items()}
    assert set(attributes) == {spec.name for spec in op.ATTRIBUTES} | set(op.PLUGIN_ATTRIBUTES)
    assert attributes | {"br": 8, "bc": 16, "prefill_threshold": 0.25, "decode_threshold": 0.25} == attributes
    site = report.rewritten[0].site
    assert (site.module, site.class_name) == ("layers.0.attn", "Attention")
    assert site.scopes == ("layers.0", "layers.0.attn")
    assert node.metadata_props["pkg.torch.onnx.name_scopes"].endswith("'softmax']")
    assert node.outputs[0].name == "o" and model.graph.outputs[0] is node.outputs[0]


def test_tiles_are_skipped_after_rewriting() -> None:
    model = graph(f"{PREFIX} p = Softmax(x) o = MatMul(p, v)")
    data = feeds(model, rows=16, columns=16)
    data["k"][:, :, 4:12] *= 0.01  # keys of two tiles never come near the first
    data["q"][..., 0], data["k"][:, :, :4, 0] = 8.0, 8.0
    dense = run(model, data)[0]
    rewritten(model, 0.1)
    sparse = run(model, data)[0]
    assert not np.allclose(dense, sparse, atol=1e-6), "nothing was skipped"
    np.testing.assert_allclose(dense, sparse, atol=2 * np.abs(data["v"]).max() * 16 * 0.1)


def test_only_what_the_attention_used_is_removed() -> None:
    model = graph(f"{PREFIX} p = Softmax(x) y = MatMul(p, v) z = Neg(c) o = Add(y, z)")
    unused = [node.op_type for node in model.graph]
    rewritten(model)
    assert [node.op_type for node in model.graph] == ["Constant", op.OP_TYPE, "Neg", "Add"]
    assert len(unused) == 8


def test_an_older_opset_is_an_error_that_says_how_to_convert() -> None:
    model = graph(f"{PREFIX} p = Softmax(x) o = MatMul(p, v)", opset=17)
    with pytest.raises(ModelError, match="opset 18") as error:
        rewritten(model)
    assert error.value.found == "opset 17" and "version_converter" in error.value.fix
    converted = onnx.version_converter.convert_version(ir.to_proto(model), 18)
    assert_same_when_dense(ir.from_proto(converted))


def test_dry_run_changes_nothing() -> None:
    from rewrite_helpers import settings

    from export.rewrite import rewrite_attention

    model = graph(f"{PREFIX} p = Softmax(x) o = MatMul(p, v)")
    assert rewrite_attention(model, settings(), dry_run=True).counts["rewritten"] == 1
    assert not op_nodes(model) and "blockskip" not in model.graph.opset_imports


REFUSED = {
    "p = Softmax(x) o = MatMul(p, v) e = Neg(p)": "used 2 times",
    "p = Softmax<axis=2>(x) o = MatMul(p, v) e = Neg(o)": "axis 2",
    "p = Softmax(x) w = Abs(p) w2 = Mul(p, p) o = MatMul(w2, v) e = Neg(w)": "used 3 times",
    "y = Exp(x) p = Softmax(y) o = MatMul(p, v) e = Neg(o)": "Exp lies between",
    "n = Neg(c) y = Mul(x, n) p = Softmax(y) o = MatMul(p, v) e = Neg(o)": None,
    "y = Mul(x, bias) p = Softmax(y) o = MatMul(p, v) e = Neg(o)": "not one number",
    "y = Where(mask, x, c) p = Softmax(y) o = MatMul(p, v) e = Neg(o)": "does not hide",
    "y = Add(x, bias) n = Neg(c) z = Mul(y, n) p = Softmax(z) o = MatMul(p, v) e = Neg(o)": "after a mask",
    "y = Add(x, bias) t = Tanh(y) p = Softmax(t) o = MatMul(p, v) e = Neg(o)": "before the soft-cap",
    "p = Softmax(x) y = Mul(p, c) o = MatMul(y, v) e = Neg(o)": "Mul lies between the Softmax and the product",
    "p = Softmax(bias) o = MatMul(p, v) e = Neg(o)": "not computed from a product",
    "p = Softmax(x) pt = Transpose<perm=[0,1,3,2]>(p) o = MatMul(pt, v) e = Neg(o)": "Transpose lies between",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_is_left_says_why(body: str) -> None:
    model = graph(
        f"{PREFIX} {body}",
        output="float[B,4,S,8] o, float[B,4,S,E] e",
        bias="float[B,4,S,T]",
        mask="bool[B,1,1,T]",
    )
    before = [node.op_type for node in model.graph]
    report = rewritten(model)
    assert [node.op_type for node in model.graph] == before
    (left,) = report.left
    assert (REFUSED[body] or "scale") in left.reason, left.reason
    assert left.reason in str(report) and report.counts["left"] == 1


def test_a_softmax_without_product_is_no_attention() -> None:
    model = graph(f"{PREFIX} o = Softmax(x)", output="float[B,4,S,T] o")
    assert rewritten(model).counts == {"found": 0, "rewritten": 0, "left": 0}


def test_a_softmax_times_a_weight_is_left() -> None:
    model = graph("p = Softmax(q) w = Constant<value = float[8,8] {" + ",".join(["1"] * 64) + "}>() o = MatMul(p, w)")
    assert rewritten(model).left


def test_what_the_configuration_leaves_dense_is_listed() -> None:
    from export.rewrite import rewrite_attention

    model = graph(f"{PREFIX} p = Softmax(x) o = MatMul(p, v)")
    report = rewrite_attention(model, lambda site: None)
    assert [entry.reason for entry in report.left] == ["the configuration leaves it dense"]
    assert report.left[0].site.module == "Softmax_4"
