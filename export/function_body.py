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
    a mask. `heads`, `kv_heads`, `size` and `v_size` are dimensions that all nodes share, None where they do not: a
    decode step is mostly the bookkeeping of shapes, and numbers need none.
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
    heads: int | None = None
    kv_heads: int | None = None
    size: int | None = None
    v_size: int | None = None


NEGATIVE_INFINITY = float("-inf")
NOTHING = -3e38
"""Not exceeded by a maximum over hidden scores: -inf, but in ONNX Runtime on CUDA the lowest float32."""

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

    def dimension(self, value: ir.Value, axis: int, known: int | None = None) -> list[int] | ir.Value:
        """One dimension as `[1] int64`, a number where it is known."""
        return self.Shape(value, start=axis, end=axis + 1) if known is None else [known]

    def shape(self, *parts: list[int] | ir.Value) -> ir.Value:
        """A shape for Reshape from numbers and `[1]` values; 0 keeps a dimension, -1 is worked out."""
        merged: list[list[int] | ir.Value] = []
        for part in parts:
            if isinstance(part, list) and merged and isinstance(merged[-1], list):
                merged[-1] = merged[-1] + part
            else:
                merged.append(part)
        if len(merged) == 1:
            return self.constant(merged[0]) if isinstance(merged[0], list) else merged[0]
        return self.Concat(*merged, axis=0)


def function_body(features: Features, opset: int) -> ir.Function:
    """The op as a model-local function whose inputs and outputs are exactly those that `features` names."""
    body = _Body()
    inputs = {name: ir.Value(name=name) for name in features.inputs}
    sizes = _Sizes(body, features, inputs)

    tiles = sizes.cut_columns(_scores(body, features, inputs, sizes))
    maximum = body.ReduceMax(tiles, [4], keepdims=0)
    not_skipped = _decide(body, features, inputs, sizes, maximum)
    exists = body.Greater(sizes.maximum_of_tile_rows(maximum), NOTHING, name=EXISTS)
    kept = body.And(exists, not_skipped, name=KEPT)

    # softmax over the tiles that are not skipped (those that do not exist are -inf throughout), product with V
    scores = body.Where(body.Unsqueeze(sizes.repeat_rows(not_skipped), [4]), tiles, NEGATIVE_INFINITY)
    weight = _weights(body, features, inputs, sizes, scores)
    v = _widened(body, features, inputs["v"])
    if "kv_lengths" in inputs:  # beyond its length V may hold any bits, and 0 * NaN is NaN
        v = body.Where(body.Less(body.Unsqueeze(sizes.column, [1]), sizes.per_batch("kv_lengths")), v, 0.0)
    product = body.MatMul(weight, v)
    v_size = body.dimension(inputs["v"], 3, features.v_size)
    o = body.Reshape(product, body.shape([0], sizes.heads, [-1], v_size))
    sees_any = body.Greater(body.ReduceMax(maximum, [3], keepdims=1), NOTHING)
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

    def __init__(self, body: _Body, features: Features, inputs: dict[str, ir.Value]) -> None:
        self.body, self.inputs = body, inputs
        self.heads = body.dimension(inputs["q"], 1, features.heads)
        self.kv_heads = body.dimension(inputs["k"], 1, features.kv_heads)
        self.size = body.dimension(inputs["q"], 3, features.size)
        self.rows, self.columns = body.dimension(inputs["q"], 2), body.dimension(inputs["k"], 2)
        self.row = body.Range(0, body.Squeeze(self.rows), 1)
        self.column = body.Range(0, body.Squeeze(self.columns), 1)
        self.bc = body.Reshape(body.attribute("bc"), [1])
        self.is_decode = body.Equal(self.rows, 1)
        self.br = body.Where(self.is_decode, 1, body.Reshape(body.attribute("br"), [1]))
        self.padded_columns = body.Mul(body.Div(body.Add(self.columns, body.Sub(self.bc, 1)), self.bc), self.bc)

    def per_batch(self, name: str) -> ir.Value:
        """An int32 input of lengths or positions as int64 `[B, 1, 1, 1]`."""
        return self.body.Reshape(self.body.Cast(self.inputs[name], to=ir.DataType.INT64), [-1, 1, 1, 1])

    def cut_columns(self, values: ir.Value) -> ir.Value:
        """`[B, Hq, Sq, Sk]` to `[B, Hq, Sq, C, bc]`, filled up with -inf."""
        body = self.body
        missing = body.Sub(self.padded_columns, self.columns)
        padded = body.Pad(values, body.shape([0] * 7, missing), NEGATIVE_INFINITY)
        return body.Reshape(padded, body.shape([0], self.heads, self.rows, [-1], self.bc))

    def maximum_of_tile_rows(self, values: ir.Value) -> ir.Value:
        """`[B, Hq, Sq, C]` to `[B, Hq, R, C]`."""
        body = self.body
        missing = body.Mod(body.Neg(self.rows), self.br)
        padded = body.Pad(values, body.shape([0] * 6, missing, [0]), NEGATIVE_INFINITY)
        shape = body.shape([0], self.heads, [-1], self.br, body.dimension(values, 3))
        return body.ReduceMax(body.Reshape(padded, shape), [3], keepdims=0)

    def repeat_rows(self, values: ir.Value) -> ir.Value:
        """`[B, Hq, R, C]` to `[B, Hq, Sq, C]`: what holds for a tile row holds for each of its rows."""
        return self.body.Gather(values, self.body.Div(self.row, self.br), axis=2)


def _widened(body: _Body, features: Features, value: ir.Value) -> ir.Value:
    return value if features.dtype == ir.DataType.FLOAT else body.Cast(value, to=ir.DataType.FLOAT)


def _scores(body: _Body, features: Features, inputs: dict[str, ir.Value], sizes: _Sizes) -> ir.Value:
    """Masked scores `[B, Hq, Sq, Sk] float32`; the query heads that share a K/V head are rows of one product."""
    q, k = _widened(body, features, inputs["q"]), _widened(body, features, inputs["k"])
    grouped = body.Reshape(q, body.shape([0], sizes.kv_heads, [-1], sizes.size))
    product = body.MatMul(body.Mul(grouped, body.attribute("scale")), body.Transpose(k, perm=[0, 1, 3, 2]))
    scores = body.Reshape(product, body.shape([0], sizes.heads, sizes.rows, [-1]))
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
    """The conditions on rows and columns, each broadcastable to `[B, Hq, Sq, Sk]`.

    Causality and lengths together are one: a row sees the columns up to its `limit`.
    """
    conditions = []
    limit: ir.Value | None = None
    row = body.Unsqueeze(sizes.row, [1])
    if features.causal or features.window:
        start = sizes.per_batch("q_start") if "q_start" in inputs else body.Sub(sizes.columns, sizes.rows)
        position = body.Add(row, start)
        if features.causal:
            free = body.Mul(body.Sub(1, body.attribute("is_causal")), _FAR)
            limit = body.Add(position, free)
        if features.window:
            window = body.attribute("window")
            window = body.Where(body.Greater(window, 0), window, _FAR)
            conditions.append(body.Greater(sizes.column, body.Sub(position, window)))
    if "kv_lengths" in inputs:
        last = body.Sub(sizes.per_batch("kv_lengths"), 1)
        limit = last if limit is None else body.Min(limit, last)
    if "q_lengths" in inputs:
        valid = body.Less(row, sizes.per_batch("q_lengths"))
        limit = body.Where(valid, _FAR if limit is None else limit, -1)
    if limit is not None:
        conditions.append(body.LessOrEqual(sizes.column, limit))
    return conditions


def _decide(body: _Body, features: Features, inputs: dict[str, ir.Value], sizes: _Sizes, maximum: ir.Value) -> ir.Value:
    """Which tiles are not skipped, `[B, Hq, R, C] bool`, from the maxima `[B, Hq, Sq, C]`."""
    tiles = body.dimension(maximum, 3)
    tile = body.Range(0, body.Squeeze(tiles), 1)
    up_to = body.LessOrEqual(tile, body.Unsqueeze(tile, [1]))
    running = body.ReduceMax(body.Where(up_to, body.Unsqueeze(maximum, [3]), NEGATIVE_INFINITY), [4], keepdims=0)
    started = body.Greater(running, NOTHING)  # a row that has seen nothing so far does not vote
    gap = sizes.maximum_of_tile_rows(body.Where(started, body.Sub(maximum, running), NEGATIVE_INFINITY))
    if features.group:
        of_heads = body.Reshape(gap, body.shape([0], sizes.kv_heads, [-1], body.Shape(gap, start=2)))
        joint = body.Expand(body.ReduceMax(of_heads, [2], keepdims=1), body.Shape(of_heads))
        gap = body.Reshape(joint, body.Shape(gap))
    gap = body.Identity(gap, name=GAP)
    log_threshold = body.Where(
        sizes.is_decode,
        _log_threshold(body, features, inputs, sizes, "decode"),
        _log_threshold(body, features, inputs, sizes, "prefill"),
    )
    # "not less" rather than "greater or equal": a NaN keeps its tile, as in the reference
    return body.Not(body.Less(gap, body.Reshape(log_threshold, [-1, 1, 1, 1])))


def _log_threshold(body: _Body, features: Features, inputs: dict[str, ir.Value], sizes: _Sizes, phase: str) -> ir.Value:
    """ln λ of a phase, a scalar, `[1]` or `[B]` float32; -inf (dense) where λ is not in [0, 1).

    Where nothing arrives at run time, runtimes fold all of this into one constant.
    """
    value = body.attribute(f"{phase}_threshold")
    if features.calibrated:
        length = inputs.get("kv_lengths", sizes.columns)
        a = body.attribute(f"{phase}_a")
        factor = body.Mul(a, body.Exp(body.Mul(body.attribute(f"{phase}_b"), body.attribute(f"{phase}_target"))))
        curve = body.Div(factor, body.Cast(length, to=ir.DataType.FLOAT))
        value = body.Where(body.Greater(a, 0.0), curve, value)
    if "threshold_scale" in inputs:
        value = body.Mul(value, inputs["threshold_scale"])
    usable = body.And(body.GreaterOrEqual(value, 0.0), body.Less(value, 1.0))
    return body.Log(body.Where(usable, value, 0.0))


def _weights(body: _Body, features: Features, inputs: dict[str, ir.Value], sizes: _Sizes, scores: ir.Value) -> ir.Value:
    """Softmax of `[B, Hq, Sq, C, bc]` over the columns, and the sink where there is one: `[B, Hk, G * Sq, Sk]`."""
    if "sinks" not in inputs:
        # straight to the rows of one product per K/V head: what the softmax runs over is the last dimension alike
        flat = body.Reshape(scores, body.shape([0], sizes.kv_heads, [-1], sizes.padded_columns))
        return body.Slice(body.Softmax(flat, axis=-1), [0], sizes.columns, [3])
    flat = body.Reshape(scores, body.shape([0], sizes.heads, sizes.rows, [-1]))
    logit = body.Reshape(_widened(body, features, inputs["sinks"]), [1, -1, 1, 1])
    logit = body.Expand(logit, body.shape(body.dimension(inputs["q"], 0), [1], sizes.rows, [1]))
    weight = body.Slice(body.Softmax(body.Concat(flat, logit, axis=3), axis=-1), [0], sizes.columns, [3])
    return body.Reshape(weight, body.shape([0], sizes.kv_heads, [-1], sizes.columns))
