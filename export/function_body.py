"""The op in standard ONNX operators: the model-local function that lets a stock runtime compute it.

The body computes what `sparse_attention.reference` defines, in float32 whatever the model's dtype, and holds the whole
score matrix: it is the portable form of the op, the plugin is the fast one. It reads every number from its node's
attributes; only what *no* node of a model uses (a window, a soft-cap, ...) is left out, so that it costs nothing.

One limit, by choice: a NaN or infinity in V of a *skipped* tile does reach the output here, because the product with V
is one MatMul (beyond `kv_lengths` V may hold anything, as the rule demands).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from export import op

GAP, EXISTS, KEPT = "tile_gap", "tile_exists", "tile_kept"
"""Names of inner values, `[B, Hq, R, C]`: parity exposes them as outputs of a single node."""

_FAR = 1 << 40  # further than any position: turns a comparison of positions off

LOWEST = {ir.DataType.FLOAT: -3.4028235e38, ir.DataType.FLOAT16: -65504.0, ir.DataType.BFLOAT16: -3.3895314e38}


@dataclass(frozen=True)
class Features:
    """What the nodes of one model use, and so what the one body they share must compute.

    `inputs` in the contract's order; `dtype` is T; the rest tells whether any node has a causal mask, a window, a
    soft-cap, a calibrated threshold, the `counts` output; `group` is the unit of all nodes; `bool_bias` that `bias` is
    a mask.
    """

    inputs: tuple[str, ...]
    dtype: ir.DataType = ir.DataType.FLOAT
    causal: bool = False
    window: bool = False
    softcap: bool = False
    calibrated: bool = False
    group: bool = False
    bool_bias: bool = False
    counts: bool = False


NEGATIVE_INFINITY = float("-inf")
_ATTRIBUTE_TYPES = {"int": ir.AttributeType.INT, "float": ir.AttributeType.FLOAT, "string": ir.AttributeType.STRING}


class _Body:
    """Builds nodes: `body.Add(a, b)` appends one and returns its output; numbers become constants."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __getattr__(self, op_type: str) -> Any:
        def append(*inputs: Any, name: str | None = None, **attributes: Any) -> ir.Value:
            values = [x if isinstance(x, ir.Value) or x is None else self.constant(x) for x in inputs]
            node = ir.node(op_type, values, attributes)
            if name:
                node.outputs[0].name = name
            self.nodes.append(node)
            return node.outputs[0]

        return append

    def constant(self, value: Any) -> ir.Value:
        dtype = np.int64 if np.asarray(value).dtype.kind == "i" else np.float32
        return self._append_constant(ir.AttrTensor("value", ir.tensor(np.asarray(value, dtype=dtype))))

    def attribute(self, name: str) -> ir.Value:
        """The node's attribute as a scalar: int64 or float32."""
        kind = {spec.name: spec.kind for spec in op.ATTRIBUTES}[name]
        return self._append_constant(ir.RefAttr(f"value_{kind}", name, _ATTRIBUTE_TYPES[kind]))

    def _append_constant(self, attribute: ir.Attr) -> ir.Value:
        node = ir.Node("", "Constant", [], [attribute])
        self.nodes.append(node)
        return node.outputs[0]

    def dimension(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension as `[1] int64`."""
        return self.Shape(value, start=axis, end=axis + 1)


def function_body(features: Features, opset: int) -> ir.Function:
    """The op as a model-local function whose inputs and outputs are exactly those that `features` names."""
    body = _Body()
    inputs = {name: ir.Value(name=name) for name in features.inputs}
    sizes = _Sizes(body, inputs)

    scores = _scores(body, features, inputs, sizes)
    tiles = sizes.cut_columns(scores)
    maximum = body.ReduceMax(tiles, [4], keepdims=0)
    kept, exists = _decide(body, features, inputs, sizes, maximum)

    # softmax over the kept tiles, product with V
    scores = body.Where(body.Unsqueeze(sizes.repeat_rows(kept), [4]), tiles, NEGATIVE_INFINITY)
    scores = body.Reshape(scores, body.Concat([0], sizes.heads, sizes.rows, [-1], axis=0))
    if "sinks" in inputs:
        logit = body.Reshape(_widened(body, features, inputs["sinks"]), [1, -1, 1, 1])
        logit = body.Expand(logit, body.Concat(body.dimension(inputs["q"], 0), [1], sizes.rows, [1], axis=0))
        scores = body.Concat(scores, logit, axis=3)
    weight = body.Slice(body.Softmax(scores, axis=-1), [0], sizes.columns, [3])
    v = _widened(body, features, inputs["v"])
    if "kv_lengths" in inputs:  # beyond its length V may hold any bits, and 0 * NaN is NaN
        length = body.Reshape(sizes.positions("kv_lengths"), [-1, 1, 1, 1])
        v = body.Where(body.Less(body.Unsqueeze(sizes.column, [1]), length), v, 0.0)
    product = body.MatMul(body.Reshape(weight, body.Concat([0], sizes.kv_heads, [-1], sizes.columns, axis=0)), v)
    o = body.Reshape(product, body.Concat([0], sizes.heads, [-1], body.dimension(inputs["v"], 3), axis=0))
    sees_any = body.Greater(body.ReduceMax(maximum, [3], keepdims=1), NEGATIVE_INFINITY)
    if features.dtype == ir.DataType.FLOAT:
        o = body.Where(sees_any, o, 0.0, name="o")
    else:
        o = body.Cast(body.Where(sees_any, o, 0.0), to=features.dtype, name="o")
    outputs = [o]
    if features.counts:
        skipped = body.And(exists, body.Not(kept))
        sums = [body.ReduceSum(body.Cast(x, to=ir.DataType.INT32), [0, 2, 3], keepdims=0) for x in (skipped, exists)]
        outputs.append(body.Concat(*(body.Unsqueeze(x, [1]) for x in sums), axis=1, name="counts"))
    attributes = [ir.Attr(spec.name, _ATTRIBUTE_TYPES[spec.kind], None) for spec in op.ATTRIBUTES]
    graph = ir.Graph(list(inputs.values()), outputs, nodes=body.nodes, opset_imports={"": opset}, name=op.OP_TYPE)
    return ir.Function(op.DOMAIN, op.OP_TYPE, graph=graph, attributes=attributes)


class _Sizes:
    """The dimensions of one call, each `[1] int64`, and the reshapes that cut rows and columns into tiles."""

    def __init__(self, body: _Body, inputs: dict[str, ir.Value]) -> None:
        self.body, self.inputs = body, inputs
        self.heads, self.rows = body.dimension(inputs["q"], 1), body.dimension(inputs["q"], 2)
        self.kv_heads, self.columns = body.dimension(inputs["k"], 1), body.dimension(inputs["k"], 2)
        self.column = body.Range(0, body.Squeeze(self.columns), 1)
        self.bc = body.Reshape(body.attribute("bc"), [1])
        self.br = body.Where(body.Equal(self.rows, 1), 1, body.Reshape(body.attribute("br"), [1]))

    def positions(self, name: str) -> ir.Value:
        """An int32 input of lengths or positions as int64."""
        return self.body.Cast(self.inputs[name], to=ir.DataType.INT64)

    def cut_columns(self, values: ir.Value) -> ir.Value:
        """`[B, Hq, Sq, Sk]` to `[B, Hq, Sq, C, bc]`, filled up with -inf."""
        body = self.body
        missing = body.Mod(body.Neg(self.columns), self.bc)
        padded = body.Pad(values, body.Concat([0] * 7, missing, axis=0), NEGATIVE_INFINITY)
        return body.Reshape(padded, body.Concat([0], self.heads, self.rows, [-1], self.bc, axis=0))

    def maximum_of_tile_rows(self, values: ir.Value) -> ir.Value:
        """`[B, Hq, Sq, C]` to `[B, Hq, R, C]`."""
        body = self.body
        missing = body.Mod(body.Neg(self.rows), self.br)
        padded = body.Pad(values, body.Concat([0] * 6, missing, [0], axis=0), NEGATIVE_INFINITY)
        shape = body.Concat([0], self.heads, [-1], self.br, body.dimension(values, 3), axis=0)
        return body.ReduceMax(body.Reshape(padded, shape), [3], keepdims=0)

    def repeat_rows(self, values: ir.Value) -> ir.Value:
        """`[B, Hq, R, C]` to `[B, Hq, Sq, C]`: what holds for a tile row holds for each of its rows."""
        body = self.body
        each = body.Expand(body.Unsqueeze(values, [3]), body.Concat([1, 1, 1], self.br, [1], axis=0))
        rows = body.Reshape(each, body.Concat([0], self.heads, [-1], body.dimension(values, 3), axis=0))
        return body.Slice(rows, [0], self.rows, [2])


def _widened(body: _Body, features: Features, value: ir.Value) -> ir.Value:
    return value if features.dtype == ir.DataType.FLOAT else body.Cast(value, to=ir.DataType.FLOAT)


def _scores(body: _Body, features: Features, inputs: dict[str, ir.Value], sizes: _Sizes) -> ir.Value:
    """Masked scores `[B, Hq, Sq, Sk] float32`; the query heads that share a K/V head are rows of one product."""
    q, k = _widened(body, features, inputs["q"]), _widened(body, features, inputs["k"])
    grouped = body.Reshape(q, body.Concat([0], sizes.kv_heads, [-1], body.dimension(inputs["q"], 3), axis=0))
    product = body.MatMul(body.Mul(grouped, body.attribute("scale")), body.Transpose(k, perm=[0, 1, 3, 2]))
    scores = body.Reshape(product, body.Concat([0], sizes.heads, sizes.rows, [-1], axis=0))
    if features.softcap:
        cap = body.attribute("softcap")
        capped = body.Mul(cap, body.Tanh(body.Div(scores, cap)))
        scores = body.Where(body.Greater(cap, 0.0), capped, scores)
    conditions = _visible_by_position(body, features, inputs, sizes)
    if "bias" in inputs and features.bool_bias:
        conditions.append(inputs["bias"])
    elif "bias" in inputs:
        bias = _widened(body, features, inputs["bias"])
        conditions.append(body.Greater(bias, LOWEST[features.dtype] / 2))
        scores = body.Add(scores, bias)
    if not conditions:
        return scores
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = body.And(visible, condition)
    return body.Where(visible, scores, NEGATIVE_INFINITY)


def _visible_by_position(body: _Body, features: Features, inputs: dict[str, ir.Value], sizes: _Sizes) -> list[ir.Value]:
    """The conditions on rows and columns, each broadcastable to `[B, Hq, Sq, Sk]`."""
    row = body.Unsqueeze(body.Range(0, body.Squeeze(sizes.rows), 1), [1])
    conditions = []
    if features.causal or features.window:
        start = sizes.positions("q_start") if "q_start" in inputs else body.Sub(sizes.columns, sizes.rows)
        position = body.Add(row, body.Reshape(start, [-1, 1, 1, 1]))
        if features.causal:
            free = body.Mul(body.Sub(1, body.attribute("is_causal")), _FAR)
            conditions.append(body.LessOrEqual(sizes.column, body.Add(position, free)))
        if features.window:
            window = body.attribute("window")
            window = body.Where(body.Greater(window, 0), window, _FAR)
            conditions.append(body.Greater(sizes.column, body.Sub(position, window)))
    if "kv_lengths" in inputs:
        conditions.append(body.Less(sizes.column, body.Reshape(sizes.positions("kv_lengths"), [-1, 1, 1, 1])))
    if "q_lengths" in inputs:
        conditions.append(body.Less(row, body.Reshape(sizes.positions("q_lengths"), [-1, 1, 1, 1])))
    return conditions


def _decide(
    body: _Body, features: Features, inputs: dict[str, ir.Value], sizes: _Sizes, maximum: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Which tiles are kept and which exist, `[B, Hq, R, C] bool`, from the maxima `[B, Hq, Sq, C]`."""
    tile = body.Range(0, body.Squeeze(body.dimension(maximum, 3)), 1)
    up_to = body.LessOrEqual(tile, body.Unsqueeze(tile, [1]))
    running = body.ReduceMax(body.Where(up_to, body.Unsqueeze(maximum, [3]), NEGATIVE_INFINITY), [4], keepdims=0)
    started = body.Greater(running, NEGATIVE_INFINITY)  # a row that has seen nothing so far does not vote
    gap = sizes.maximum_of_tile_rows(body.Where(started, body.Sub(maximum, running), NEGATIVE_INFINITY))
    if features.group:
        of_heads = body.Reshape(gap, body.Concat([0], sizes.kv_heads, [-1], body.Shape(gap, start=2), axis=0))
        joint = body.Expand(body.ReduceMax(of_heads, [2], keepdims=1), body.Shape(of_heads))
        gap = body.Reshape(joint, body.Shape(gap))
    gap = body.Identity(gap, name=GAP)
    threshold = _threshold(body, features, inputs, sizes)
    log_threshold = body.Reshape(body.Log(threshold), [-1, 1, 1, 1])
    exists = body.Greater(sizes.maximum_of_tile_rows(maximum), NEGATIVE_INFINITY, name=EXISTS)
    # "not less" rather than "greater or equal": a NaN keeps its tile, as in the reference
    return body.And(exists, body.Not(body.Less(gap, log_threshold)), name=KEPT), exists


def _threshold(body: _Body, features: Features, inputs: dict[str, ir.Value], sizes: _Sizes) -> ir.Value:
    """λ of the call, `[1]` or `[B]` float32; 0 where it is not in [0, 1)."""
    is_decode = body.Equal(sizes.rows, 1)

    def of_phase(name: str) -> ir.Value:
        return body.Where(is_decode, body.attribute(f"decode_{name}"), body.attribute(f"prefill_{name}"))

    value = of_phase("threshold")
    if features.calibrated:
        length = sizes.inputs["kv_lengths"] if "kv_lengths" in inputs else sizes.columns
        a = of_phase("a")
        curve = body.Mul(a, body.Exp(body.Mul(of_phase("b"), of_phase("target"))))
        value = body.Where(body.Greater(a, 0.0), body.Div(curve, body.Cast(length, to=ir.DataType.FLOAT)), value)
    if "threshold_scale" in inputs:
        value = body.Mul(value, inputs["threshold_scale"])
    usable = body.And(body.GreaterOrEqual(value, 0.0), body.Less(value, 1.0))
    return body.Where(usable, value, 0.0)
