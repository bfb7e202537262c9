"""The index calculus against ONNX Runtime: random subgraphs, every element, several sizes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from export.rewrite.expression import NotUnderstoodError, Truth, substitute, symbols
from export.rewrite.index_calculus import Grid, IndexCalculus
from export.rewrite.poly import Poly
from export.rewrite.shapes import Shapes
from export.runners import session

HEAD = (
    "zero = Constant<value_int=0>() one = Constant<value_int=1>() two = Constant<value_int=2>() "
    "a0 = Constant<value_ints=[0]>() a1 = Constant<value_ints=[1]>() m1 = Constant<value_ints=[-1]>() "
    "three = Constant<value_ints=[3]>() end = Constant<value_ints=[9223372036854775807]>() "
    "low = Constant<value_float=-1e9>() nought = Constant<value_float=0.0>() unit = Constant<value_float=1.0>() "
    "s1 = Shape<start=0, end=1>(x) s = Squeeze(s1) t1 = Shape<start=1, end=2>(x) t = Squeeze(t1) "
    "i = Range(zero, s, one) j = Range(zero, t, one) st = Concat<axis=0>(s1, t1)"
)
INTEGERS = [
    "{o} = Unsqueeze(i, a1)", "{o} = Unsqueeze(j, a0)", "{o} = Add({a}, {b})", "{o} = Sub({a}, {b})",
    "{o} = Add({a}, s)", "{o} = Mul({a}, two)", "{o} = Sub({a}, one)", "{o} = Expand({a}, st)",
    "{o} = Where({c}, {a}, {b})", "{o} = Cast<to=7>({c})", "{o}f = Cast<to=1>({a}) {o} = Cast<to=7>({o}f)",
    "{o}e = Expand({a}, st) {o}h = Unsqueeze(i, a1) {o}c = Concat<axis=1>({o}h, {o}e) "
    "{o} = Slice({o}c, a0, m1, a1)",
    "{o}e = Expand({a}, st) {o}u = Unsqueeze({o}e, a0) {o}t = Transpose<perm=[1,0,2]>({o}u) {o} = Squeeze({o}t, a1)",
    "{o}e = Expand({a}, st) {o} = Gather<axis=1>({o}e, j)", "{o}e = Expand({a}, st) {o} = Gather<axis=0>({o}e, i)",
    "{o}e = Expand({a}, st) {o}p = Unsqueeze(i, a1) {o}q = Expand({o}p, st) {o}n = Constant<value_ints=[2]>() "
    "{o}r = Unsqueeze({o}q, {o}n) {o}v = Unsqueeze(j, a0) {o}w = Expand({o}v, st) {o}y = Unsqueeze({o}w, {o}n) "
    "{o}g = Concat<axis=2>({o}r, {o}y) {o} = GatherND({o}e, {o}g)",
]  # fmt: skip
TRUTHS = [
    "{o} = Less({a}, {b})", "{o} = LessOrEqual({a}, {b})", "{o} = Greater({a}, {b})", "{o} = GreaterOrEqual({a}, {b})",
    "{o} = Equal({a}, {b})", "{o} = And({c}, {d})", "{o} = Or({c}, {d})", "{o} = Not({c})", "{o} = Cast<to=9>({a})",
    "{o}f = Where({c}, nought, low) {o} = Equal({o}f, nought)", "{o}e = Expand({c}, st) {o} = Trilu<upper=0>({o}e)",
    "{o}e = Expand({c}, st) {o} = Trilu({o}e, one)", "{o}f = Where({c}, unit, nought) {o} = Cast<to=9>({o}f)",
]  # fmt: skip


def random_graph(seed: int, steps: int = 9) -> tuple[onnx.ModelProto, list[str]]:
    """A chain of index operations over `x [S, T]`, every intermediate an output."""
    rng = random.Random(seed)
    lines = [HEAD, "row = Unsqueeze(i, a1)", "column = Unsqueeze(j, a0)", "below = LessOrEqual(column, row)"]
    integers, truths = ["row", "column"], ["below"]
    for step in range(steps):
        kind, pool = rng.choice([(INTEGERS, integers), (TRUTHS, truths)])
        name = f"n{step}"
        operands = {"a": rng.choice(integers[-4:]), "b": rng.choice(integers), "c": rng.choice(truths[-3:]),
                    "d": rng.choice(truths)}  # fmt: skip
        lines.append(rng.choice(kind).format(o=name, **operands))
        pool.append(name)
    names = integers + truths
    outputs = ", ".join([f"int64[P,Q] {name}" for name in integers] + [f"bool[P,Q] {name}" for name in truths])
    text = f'<ir_version: 10, opset_import: ["" : 18]> g (float[S,T] x) => ({outputs}) {{ {" ".join(lines)} }}'
    proto = onnx.parser.parse_model(text)
    for output in proto.graph.output:
        del output.type.tensor_type.shape.dim[:]
        output.type.tensor_type.ClearField("shape")
        assert output.type.tensor_type.elem_type in (TensorProto.INT64, TensorProto.BOOL)
    return proto, names


def evaluate(grid: Grid, sizes: dict[str, int]) -> np.ndarray | None:
    """A grid as an array, for given sizes; None where it depends on a dimension without a formula."""
    values = {name: Poly.of(size) for name, size in sizes.items()}
    free = {name for name in symbols(grid.element) if not name.startswith("#")}
    shape = [dim.substitute(values).constant for dim in grid.shape]
    if None in shape or free - values.keys():
        return None
    array = np.empty(shape, dtype=np.int64)
    for position in itertools.product(*map(range, shape)):
        at = {f"#{axis}": Poly.of(index) for axis, index in enumerate(position)}
        element = substitute(grid.element, values | at)
        assert isinstance(element, Truth | Poly), element
        array[position] = int(element.value) if isinstance(element, Truth) else element.constant
    return array


def test_random_subgraphs_are_evaluated_exactly() -> None:
    understood = 0
    for seed in range(60):
        proto, names = random_graph(seed)
        model = ir.from_proto(proto)
        calculus = IndexCalculus(Shapes())
        values = {value.name: value for node in model.graph for value in node.outputs}
        runner = session(proto.SerializeToString())
        for rows, columns in ((1, 1), (3, 3), (2, 5)):
            expected = runner.run(names, {"x": np.zeros((rows, columns), dtype=np.float32)})
            for name, array in zip(names, expected, strict=True):
                try:
                    found = evaluate(calculus.grid(values[name]), {"S": rows, "T": columns})
                except NotUnderstoodError:
                    continue
                if found is None:
                    continue
                understood += 1
                np.testing.assert_array_equal(found, array.astype(np.int64).reshape(found.shape), f"{seed} {name}")
    assert understood > 1000, "too little was understood for the comparison to mean anything"


@pytest.mark.parametrize("body", ["y = Add(i, data)", "y = Gather(i, data)", "z = Sub(i, one) y = Gather(i, z)"])
def test_data_is_not_understood(body: str) -> None:
    text = (
        f'<ir_version: 10, opset_import: ["" : 18]> g (float[S,T] x, int64[S] data) => (int64[S] y) {{ {HEAD} {body} }}'
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    with pytest.raises(NotUnderstoodError):
        IndexCalculus(Shapes()).grid(model.graph.outputs[0])
