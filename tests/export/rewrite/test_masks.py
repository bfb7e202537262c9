"""Masks: what is proven causal or a window, and what only looks like it.

Every graph is checked twice: what the report says, and the numbers in ONNX Runtime at λ = 0 for several sizes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrite_helpers import PREFIX, feeds, graph, op_nodes, rewritten, run

from export.rewrite.index_calculus import describe_array
from export.rewrite.poly import Poly, parse

NUMBERS = (
    "zero = Constant<value_int=0>() one = Constant<value_int=1>() low = Constant<value_float=-inf>() "
    "nought = Constant<value_float=0.0>() a0 = Constant<value_ints=[0]>() a1 = Constant<value_ints=[1]>() "
    "rows1 = Shape<start=2, end=3>(q) rows = Squeeze(rows1) columns1 = Shape<start=2, end=3>(k) "
    "columns = Squeeze(columns1) i = Range(zero, rows, one) j = Range(zero, columns, one) row = Unsqueeze(i, a1)"
)
CHOSEN = "m = Where(see, x, low) p = Softmax(m) o = MatMul(p, v)"
SUM = "m = Add(x, add) p = Softmax(m) o = MatMul(p, v)"
SQUARE = {"k": "float[B,4,S,8]", "v": "float[B,4,S,8]"}


def model_of(mask: str, use: str = CHOSEN, **types: str) -> ir.Model:
    text = f"{NUMBERS} {PREFIX} {mask} {use}".replace("value_float=-inf", "value_float=-3.4e38")
    return graph(text, **types)


def check(model: ir.Model, *sizes: tuple[int, int]):  # type: ignore[no-untyped-def]
    """Compare the numbers before and after rewriting at every size; return the one entry of the report."""
    data = [feeds(model, rows=rows, columns=columns) for rows, columns in sizes]
    expected = [run(model, one)[0] for one in data]
    report = rewritten(model)
    assert not report.left, str(report)
    for one, wanted in zip(data, expected, strict=True):
        np.testing.assert_allclose(run(model, one)[0], wanted, atol=1e-5)
    return report.rewritten[0]


SQUARES = ((1, 1), (2, 2), (13, 13))
CAUSAL = {
    "columns <= rows": "see = LessOrEqual(j, row)",
    "rows >= columns": "see = GreaterOrEqual(row, j)",
    "columns < rows + 1": "next = Add(row, one) see = Less(j, next)",
    "not columns > rows": "above = Greater(j, row) see = Not(above)",
    "Trilu of true": "n = Concat<axis=0>(rows1, rows1) t = Equal(zero, zero) ones = Expand(t, n) "
    "see = Trilu<upper=0>(ones)",
    "not Trilu of true": "n = Concat<axis=0>(rows1, rows1) t = Equal(zero, zero) ones = Expand(t, n) "
    "above = Trilu<upper=1>(ones, one) see = Not(above)",
    "cumulative positions": "tt = Constant<value = float {1.0}>() n = Concat<axis=0>(rows1, rows1) f = Expand(tt, n) "
    "l = Trilu<upper=0>(f) see = Equal(l, tt)",
    "Trilu of a filled shape": "n = Concat<axis=0>(rows1, rows1) f = ConstantOfShape<value = float[1] {1.0}>(n) "
    "l = Trilu<upper=0>(f) none = Equal(l, nought) see = Not(none)",
    "joined with true": "le = LessOrEqual(j, row) always = GreaterOrEqual(row, zero) see = And(always, le)",
    "neither hidden": "above = Greater(j, row) never = Less(j, zero) hidden = Or(above, never) see = Not(hidden)",
    "expanded": "le = LessOrEqual(j, row) four = Constant<value_ints=[2,1]>() n = Concat<axis=0>(four, rows1, rows1) "
    "see = Expand(le, n)",
    "as a number": "le = LessOrEqual(j, row) number = Cast<to=1>(le) see = Cast<to=9>(number)",
    "gathered through an index grid": "at = Unsqueeze(row, a1) at1 = Constant<value_ints=[-1]>() "
    "flat = Unsqueeze(i, at1) gathered = GatherND(j, flat) g1 = Unsqueeze(gathered, a1) see = LessOrEqual(j, g1)",
}


@pytest.mark.parametrize("spelling", CAUSAL)
def test_causal_masks_are_proven(spelling: str) -> None:
    entry = check(model_of(CAUSAL[spelling], **SQUARE), *SQUARES)
    assert entry.is_causal and entry.inputs == ("q", "k", "v") and entry.window == 0


ADDED = {
    "chosen": "le = LessOrEqual(j, row) add = Where(le, nought, low)",
    "chosen the other way": "gt = Greater(j, row) add = Where(gt, low, nought)",
    "Trilu of the lowest": "n = Concat<axis=0>(rows1, rows1) full = Expand(low, n) add = Trilu<upper=1>(full, one)",
    "two masks": "le = LessOrEqual(j, row) first = Where(le, nought, low) n = Concat<axis=0>(rows1, rows1) "
    "second = Expand(nought, n) add = Add(first, second)",
}


@pytest.mark.parametrize("spelling", ADDED)
def test_added_causal_masks_are_proven(spelling: str) -> None:
    entry = check(model_of(ADDED[spelling], SUM, **SQUARE), *SQUARES)
    assert entry.is_causal and entry.inputs == ("q", "k", "v")


def test_upper_left_alignment_of_a_rectangle_gets_a_start() -> None:
    entry = check(model_of("see = LessOrEqual(j, row)"), (5, 11), (11, 11), (3, 4))
    assert entry.is_causal and entry.inputs == ("q", "k", "v", "q_start")


def test_causality_behind_a_past_is_the_default_of_the_op() -> None:
    """Row 0 stands at the number of past keys, Sk - Sq."""
    mask = "past = Sub(columns, rows) position = Add(row, past) see = LessOrEqual(j, position)"
    entry = check(model_of(mask), (5, 11), (1, 8), (6, 6))
    assert entry.is_causal and entry.inputs == ("q", "k", "v")


def test_an_offset_that_the_op_cannot_take_stays_a_mask() -> None:
    """Row i sees key j up to i + 2 * Sq: neither a number nor Sk - Sq."""
    mask = "far = Add(rows, rows) position = Add(row, far) see = LessOrEqual(j, position)"
    entry = check(model_of(mask), (2, 11), (3, 9))
    assert not entry.is_causal and entry.inputs == ("q", "k", "v", "bias")


WINDOW = "w = Constant<value_int={size}>() back = Sub(row, w) near = Greater(j, back)"


@pytest.mark.parametrize("size", [1, 3, 4096])
def test_a_window_is_found_however_long(size: int) -> None:
    """No trial at small sizes could tell a window of 4096 from a causal mask."""
    mask = f"{WINDOW.format(size=size)} le = LessOrEqual(j, row) see = And(le, near)"
    entry = check(model_of(mask, **SQUARE), (9, 9))
    assert entry.is_causal and entry.window == size and entry.inputs == ("q", "k", "v")


def test_a_window_on_both_sides() -> None:
    upper = "w2 = Constant<value_int=2>() to = Add(row, w2) le = LessOrEqual(j, to)"
    mask = f"{WINDOW.format(size=3)} {upper} see = And(le, near)"
    entry = check(model_of(mask, **SQUARE), (9, 9), (2, 2))
    assert entry.window == 5 and entry.inputs == ("q", "k", "v", "q_start")


NOT_CAUSAL = {
    "anti-causal": "see = GreaterOrEqual(j, row)",
    "a multiple of the row": "two = Constant<value_int=2>() twice = Mul(row, two) see = LessOrEqual(j, twice)",
    "one of two keys": "two = Constant<value_int=2>() odd = Mod(j, two) even = Equal(odd, zero) "
    "le = LessOrEqual(j, row) see = Or(even, le)",
    "data decides": "le = LessOrEqual(j, row) see = Or(le, free)",
    "the start is data": "position = Add(row, shift) see = LessOrEqual(j, position)",
}


@pytest.mark.parametrize("spelling", NOT_CAUSAL)
def test_what_is_not_causal_stays_a_mask(spelling: str) -> None:
    types = {"free": "bool[B,1,1,S]"} if "free" in NOT_CAUSAL[spelling] else {}
    types |= {"shift": "int64[1]"} if "shift" in NOT_CAUSAL[spelling] else {}
    entry = check(model_of(NOT_CAUSAL[spelling], **SQUARE, **types), (9, 9), (7, 7))
    assert not entry.is_causal
    assert entry.inputs == ("q", "k", "v", "bias") or (spelling == "anti-causal" and entry.window == 1)


def test_padding_is_kept_and_causality_is_not_stored() -> None:
    mask = "le = LessOrEqual(j, row) see = And(le, pad)"
    model = model_of(mask, **SQUARE, pad="bool[B,1,1,S]")
    entry = check(model, (9, 9), (2, 2))
    assert entry.is_causal and entry.inputs == ("q", "k", "v", "bias")
    assert op_nodes(model)[0].inputs[3] is next(value for value in model.graph.inputs if value.name == "pad")


def test_a_bias_beside_causality_is_kept() -> None:
    mask = "le = LessOrEqual(j, row) add = Where(le, alibi, low)"
    entry = check(model_of(mask, SUM, **SQUARE, alibi="float[1,4,1,S]"), (9, 9))
    assert entry.is_causal and entry.inputs == ("q", "k", "v", "bias")


def test_a_mask_that_is_scaled_with_the_scores() -> None:
    """Falcon adds its slopes to q·k and divides the sum."""
    mask = "le = LessOrEqual(j, row) add = Where(le, alibi, low) sum = Add(x, add) half = Constant<value_float=0.5>()"
    use = "m = Mul(sum, half) p = Softmax(m) o = MatMul(p, v)"
    entry = check(model_of(mask, use, **SQUARE, alibi="float[1,4,1,S]"), (9, 9))
    assert entry.is_causal and entry.inputs == ("q", "k", "v", "bias")


def test_a_mask_that_makes_more_batches_is_refused() -> None:
    model = model_of(
        "see = Identity(pad)", pad="bool[B,1,1,T]", q="float[1,4,S,8]", k="float[1,4,T,8]", v="float[1,4,T,8]"
    )
    assert "more batches" in rewritten(model).left[0].reason


def test_a_penalty_that_does_not_hide_is_a_bias() -> None:
    mask = "five = Constant<value_float=-5.0>() le = LessOrEqual(j, row) add = Where(le, nought, five)"
    entry = check(model_of(mask, SUM, **SQUARE), (9, 9))
    assert not entry.is_causal and entry.inputs == ("q", "k", "v", "bias")


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_stored_triangle_that_is_sliced(kind: str) -> None:
    """GPT-2 of old keeps a [1, 1, 64, 64] buffer and cuts what it needs."""
    buffer = np.tril(np.ones((1, 1, 64, 64), dtype=bool))
    array = buffer if kind == "bool" else np.where(buffer, 0, np.float32(-1e9)).astype(np.float32)
    cut = "axes = Constant<value_ints=[2,3]>() at = Constant<value_ints=[0,0]>() to = Concat<axis=0>(rows1, columns1) "
    cut += f"{'see' if kind == 'bool' else 'add'} = Slice(stored, at, to, axes)"
    model = model_of(cut, CHOSEN if kind == "bool" else SUM, **SQUARE, stored=f"{kind}[1,1,64,64]")
    stored = next(value for value in model.graph.inputs if value.name == "stored")
    model.graph.inputs.remove(stored)
    stored.const_value = ir.tensor(array, name="stored")
    model.graph.register_initializer(stored)
    entry = check(model, (9, 9), (2, 2))
    assert entry.is_causal and entry.inputs == ("q", "k", "v")
    assert "stored" not in model.graph.initializers


def test_a_default_that_callers_can_override_is_no_constant() -> None:
    """An initializer that is also a graph input may be anything at run time."""
    model = model_of("see = Identity(stored)", **SQUARE, stored="bool[9,9]")
    stored = next(value for value in model.graph.inputs if value.name == "stored")
    stored.const_value = ir.tensor(np.tril(np.ones((9, 9), dtype=bool)), name="stored")
    model.graph.register_initializer(stored)
    assert rewritten(model).rewritten[0].inputs == ("q", "k", "v", "bias")


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("columns", [1, 5, 7])
def test_constants_are_described_exactly(rows: int, columns: int) -> None:
    distance = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    for low, high in ((-9, 0), (-9, 2), (-2, 0), (1, 9), (-1, 1)):
        array = (distance >= low) & (distance <= high)
        for given in (array, ~array):
            expression = describe_array(given)
            found = [[_holds(expression, r, c) for c in range(columns)] for r in range(rows)]
            assert (np.array(found) == given).all(), (low, high)


def _holds(expression, row: int, column: int) -> bool:  # type: ignore[no-untyped-def]
    from export.rewrite.expression import Truth, substitute

    result = substitute(expression, {"#0": Poly.of(row), "#1": Poly.of(column)})
    assert isinstance(result, Truth)
    return result.value


def test_dimension_names_are_read() -> None:
    batch, seq = Poly.symbol("batch"), Poly.symbol("seq")
    assert parse("4*batch") == batch * 4
    assert parse("((batch*seq)//batch)") == seq
    assert parse("past + seq") - parse("past") == seq
    assert parse("Min(128, seq)") != seq and parse("Min(128, seq)") == parse("Min(128, seq)")
    assert parse("((seq**2)//seq)") == seq
    assert parse("seq//2") != seq and not (seq - batch).is_nonnegative
