"""The ONNX operator `Attention`: what becomes the op, and what is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from rewrite_helpers import assert_same_when_dense, attribute, feeds, graph, op_nodes, rewritten, run

from export import op

HIDDEN = {"q": "float[B,S,32]", "k": "float[B,T,16]", "v": "float[B,T,16]"}


def test_four_dimensions_with_grouped_heads_and_implied_scale() -> None:
    model = graph("o = Attention(q, k, v)", opset=23, k="float[B,2,T,8]", v="float[B,2,T,8]")
    assert_same_when_dense(model, rows=6)
    assert attribute(model, "scale") == pytest.approx(8**-0.5)
    assert [node.op_type for node in model.graph] == [op.OP_TYPE]


@pytest.mark.parametrize("options", ["scale=0.2", "softcap=4.0", "is_causal=1", "scale=0.3, softcap=2.0, is_causal=1"])
def test_attributes(options: str) -> None:
    model = graph(f"o = Attention<{options}>(q, k, v)", opset=23)
    assert_same_when_dense(model)


@pytest.mark.parametrize(("rows", "columns"), [(5, 11), (1, 11), (11, 5)])
def test_causality_aligns_at_the_upper_left(rows: int, columns: int) -> None:
    model = graph("o = Attention<is_causal=1>(q, k, v)", opset=23)
    report = assert_same_when_dense(model, rows=rows, columns=columns)
    assert report.rewritten[0].inputs == ("q", "k", "v", "q_start") and report.rewritten[0].is_causal


def test_causality_of_a_square_needs_no_start() -> None:
    model = graph("o = Attention<is_causal=1>(q, k, v)", opset=23, k="float[B,4,S,8]", v="float[B,4,S,8]")
    assert assert_same_when_dense(model).rewritten[0].inputs == ("q", "k", "v")


@pytest.mark.parametrize("kind", ["bool[B,1,S,T]", "float[4,S,T]", "bool[S,T]", "float[B,1,S,T]"])
def test_masks(kind: str) -> None:
    model = graph("o = Attention<is_causal=1>(q, k, v, mask)", opset=23, mask=kind)
    report = assert_same_when_dense(model)
    assert report.rewritten[0].inputs == ("q", "k", "v", "bias", "q_start")


def test_heads_in_the_hidden_axis() -> None:
    model = graph(
        "o = Attention<q_num_heads=4, kv_num_heads=2, is_causal=1>(q, k, v, mask)",
        opset=23, output="float[B,S,32] o", mask="bool[B,1,S,T]", **HIDDEN,
    )  # fmt: skip
    assert_same_when_dense(model, rows=7)


def test_valid_lengths_become_kv_lengths() -> None:
    model = graph("o = Attention<is_causal=1>(q, k, v, , , , n)", opset=24, n="int64[B]")
    data = feeds(model, rows=4, columns=11)  # 8 of 11 keys are valid: row 0 is at position 4
    report = rewritten(model)
    assert report.rewritten[0].inputs == ("q", "k", "v", "kv_lengths", "q_start")
    found = run(model, data)[0]
    short = graph("o = Attention<is_causal=1>(q, k, v)", opset=24)
    full = {name: np.concatenate([np.zeros_like(data["q"]), data["q"]], 2) if name == "q" else data[name][:, :, :8]
            for name in ("q", "k", "v")}  # fmt: skip
    np.testing.assert_allclose(found, run(short, full)[0][:, :, 4:], atol=1e-5)


def test_a_mask_that_is_causal_becomes_an_attribute() -> None:
    model = graph(
        "n = Shape<start=2, end=3>(q) s = Squeeze(n) zero = Constant<value_int=0>() one = Constant<value_int=1>() "
        "i = Range(zero, s, one) a = Constant<value_ints=[1]>() c = Unsqueeze(i, a) m = GreaterOrEqual(c, i) "
        "o = Attention(q, k, v, m)",
        opset=23, k="float[B,4,S,8]", v="float[B,4,S,8]",
    )  # fmt: skip
    report = assert_same_when_dense(model)
    assert report.rewritten[0].inputs == ("q", "k", "v") and report.rewritten[0].is_causal


REFUSED = {
    "o, pk, e = Attention(q, k, v, , past, past)": "past_key",
    "o, pk, pv, e = Attention(q, k, v)": "qk_matmul_output",
    "o = Attention<scale=-1.0>(q, k, v) e = Neg(o)": "-1.0",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_is_refused(body: str) -> None:
    model = graph(body, opset=23, output="float[B,4,S,8] o, float[B,4,S,E] e", past="float[B,4,P,8]")
    (left,) = rewritten(model).left
    assert REFUSED[body] in left.reason
    assert not op_nodes(model)


def test_float64_is_refused() -> None:
    types = {name: f"double[B,4,{'S' if name == 'q' else 'T'},8]" for name in "qkv"}
    model = graph("o = Attention(q, k, v)", opset=23, output="double[B,4,S,8] o", **types)
    assert "float32, float16 and bfloat16" in rewritten(model).left[0].reason


def test_a_node_of_another_domain_is_not_touched() -> None:
    model = graph("o = Attention(q, k, v)", opset=23)
    model.graph[0].domain = "com.microsoft"
    assert rewritten(model).counts["found"] == 0
