"""Un-expansion of K and V, and the expansions that mean something else."""

from __future__ import annotations

import numpy as np
import pytest
from rewrite_helpers import assert_same_when_dense, graph, op_nodes, rewritten

SMALL = {"k": "float[B,2,T,8]", "v": "float[B,2,T,8]"}


def expanded(name: str, axis: int = 2, repeat: str = "Expand", group: int = 2) -> str:
    """Nodes that repeat the heads of `name` into `name`4."""
    times = [1, 1, 1, 1, 1]
    times[axis] = group
    return (
        f"{name}_at = Constant<value_ints=[{axis}]>() {name}_5 = Unsqueeze({name}, {name}_at) "
        f"{name}_n = Constant<value_ints={times}>() {name}_e = {repeat}({name}_5, {name}_n) "
        f"{name}_s = Constant<value_ints=[0,4,-1,8]>() {name}4 = Reshape({name}_e, {name}_s)"
    )


ATTENTION = "kt = Transpose<perm=[0,1,3,2]>(k4) s = MatMul(q, kt) p = Softmax(s) o = MatMul(p, v4)"


@pytest.mark.parametrize("repeat", ["Expand", "Tile"])
def test_repeated_heads_are_un_expanded(repeat: str) -> None:
    model = graph(f"{expanded('k', repeat=repeat)} {expanded('v', repeat=repeat)} {ATTENTION}", **SMALL)
    report = assert_same_when_dense(model, rows=7)
    assert report.rewritten[0].kv_groups == 2
    assert list(op_nodes(model)[0].inputs) == list(model.graph.inputs)


@pytest.mark.parametrize("v_times", [2, 1])
def test_a_repetition_merged_into_the_next_reshape(v_times: int) -> None:
    """A static export at opset 18 reshapes the repeated K at once to three dimensions for its transposition."""
    k = expanded("k").partition(" k_s =")[0]
    transposed = (
        "three = Constant<value_ints=[8,11,8]>() flat = Reshape(k_e, three) t = Transpose<perm=[0,2,1]>(flat) "
        "four = Constant<value_ints=[2,4,8,11]>() kt = Reshape(t, four)"
    )
    v = expanded("v") if v_times == 2 else "v4 = Identity(v)"
    kv_heads = 2 if v_times == 2 else 4
    types = {"q": "float[2,4,11,8]", "k": "float[2,2,11,8]", "v": f"float[2,{kv_heads},11,8]"}
    model = graph(f"{k} {transposed} {v} {ATTENTION.partition(') ')[2]}", output="float[2,4,11,8] o", **types)
    if v_times == 1:
        assert rewritten(model).left[0].reason == "K is repeated 2 times and V 1 times"
        return
    assert assert_same_when_dense(model).rewritten[0].kv_groups == 2
    assert list(op_nodes(model)[0].inputs) == list(model.graph.inputs)


def test_a_scale_between_expansion_and_product() -> None:
    scaled = ATTENTION.replace("(k4)", "(k5)").replace("kt =", "c = Constant<value_float=0.5>() k5 = Mul(k4, c) kt =")
    model = graph(f"{expanded('k')} {expanded('v')} {scaled}", **SMALL)
    assert assert_same_when_dense(model).rewritten[0].kv_groups == 2


def test_blocks_of_heads_repeated_stay_expanded() -> None:
    """Repeating [h0, h1] as [h0, h1, h0, h1] pairs query head 1 with K/V head 1, not 0."""
    model = graph(f"{expanded('k', axis=1)} {expanded('v', axis=1)} {ATTENTION}", **SMALL)
    report = assert_same_when_dense(model)
    assert report.rewritten[0].kv_groups == 1
    assert op_nodes(model)[0].inputs[2].name == "v4"


def test_only_one_of_k_and_v_repeated_stays_expanded() -> None:
    attention = ATTENTION.replace("v4", "v")
    model = graph(f"{expanded('k')} {attention}", k="float[B,2,T,8]")
    report = assert_same_when_dense(model)
    assert "stay expanded" in report.rewritten[0].notes[0]


def test_one_shared_head_broadcasts() -> None:
    model = graph(ATTENTION.replace("k4", "k").replace("v4", "v"), k="float[B,1,T,8]", v="float[B,1,T,8]")
    assert_same_when_dense(model)


def test_heads_that_do_not_divide_are_left() -> None:
    model = graph(ATTENTION.replace("k4", "k").replace("v4", "v"), k="float[B,4,T,8]", v="float[B,1,T,8]")
    assert "do not form groups" in rewritten(model).left[0].reason


def test_an_expanded_batch_is_no_group() -> None:
    """Expanding another axis as well is not the repetition of heads alone."""
    body = expanded("k").replace("[1, 1, 2, 1, 1]", "[2, 1, 2, 1, 1]"), expanded("v").replace("[1, 1, 2,", "[2, 1, 2,")
    model = graph(f"{' '.join(body)} {ATTENTION}", q="float[2,4,S,8]", k="float[1,2,T,8]", v="float[1,2,T,8]",
                  output="float[2,4,S,8] o")  # fmt: skip
    report = assert_same_when_dense(model)
    assert report.rewritten[0].kv_groups == 1
    assert np.prod(op_nodes(model)[0].inputs[0].shape[:1]) == 2
