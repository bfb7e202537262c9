"""The rule, loop by loop in double precision NumPy: slow, independent of the package's code, only for small shapes.

Written from the definition of the op alone: nothing here is shared with `sparse_attention.reference`, so that an error
in one of them shows as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

ROUNDING = 1e-4  # of a float32 score below 100


@dataclass(frozen=True)
class Definition:
    """What the rule says of one call: `out [B, Hq, Sq, Dv]`; the rest per tile, `[B, Hq, R, C]`.

    `gap` is -inf where no row votes; `log_threshold [B]` is ln λ; `pairs [B, Hq, Sq, Sk]` tells which scores entered
    the softmax, `visible` which were visible; `correction` holds the least and the most that the correction factor can
    be, where two maxima may be equal in float32 and are not here.
    """

    out: np.ndarray
    gap: np.ndarray
    exists: np.ndarray
    kept: np.ndarray
    log_threshold: np.ndarray
    visible: np.ndarray
    pairs: np.ndarray
    correction: tuple[float, float]

    @property
    def counts(self) -> np.ndarray:
        """`[Hq, 2]`: skipped, total."""
        skipped = (self.exists & ~self.kept).sum((0, 2, 3))
        return np.stack([skipped, self.exists.sum((0, 2, 3))], -1)


def threshold_of_call(threshold: Mapping[str, float], length: int, scale: float) -> float:
    """λ of one phase: `threshold`, `a`, `b`, `target`; 0 for whatever is not in [0, 1)."""
    value = threshold.get("threshold", 0.0)
    if threshold.get("a", 0.0) > 0:
        curve = threshold["a"] * math.exp(threshold["b"] * threshold["target"])
        value = curve / length if length else math.inf
    value = value * scale
    return float(np.float32(value)) if 0.0 <= value < 1.0 else 0.0


def define(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    prefill: Mapping[str, float],
    decode: Mapping[str, float],
    br: int,
    bc: int,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: np.ndarray | None = None,
    window: int = 0,
    kv_lengths: np.ndarray | None = None,
    q_start: np.ndarray | None = None,
    q_lengths: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    unit: str = "head",
    threshold_scale: float = 1.0,
    lowest: float = float(np.finfo(np.float32).min),
) -> Definition:
    """Block-skip softmax attention by its definition; `lowest` is the least number of the additive bias's dtype."""
    batch, heads, rows, size = q.shape
    columns, group = k.shape[2], heads // k.shape[1]
    scale = 1.0 / math.sqrt(size) if scale is None else scale
    br = 1 if rows == 1 else br
    tile_rows, tile_columns = math.ceil(rows / br), math.ceil(columns / bc)
    shape = (batch, heads, tile_rows, tile_columns)
    gap, exists = np.full(shape, -np.inf), np.zeros(shape, bool)
    scores = np.full((batch, heads, rows, columns), -np.inf)
    log_threshold = np.zeros(batch)
    rises, after_first = [0, 0], 0
    if bias is not None:
        bias = np.broadcast_to(bias, (batch, heads, rows, columns))

    for b in range(batch):
        length = columns if kv_lengths is None else int(kv_lengths[b])
        start = columns - rows if q_start is None else int(q_start[b])
        valid = rows if q_lengths is None else int(q_lengths[b])
        lam = threshold_of_call(decode if rows == 1 else prefill, length, threshold_scale)
        log_threshold[b] = math.log(lam) if lam > 0 else -math.inf
        for h in range(heads):
            for i in range(rows):
                for j in range(columns):
                    sees = j < length and i < valid
                    sees = sees and (not is_causal or j <= i + start)
                    sees = sees and (not window or j > i + start - window)
                    if sees and bias is not None:
                        sees = bool(bias[b, h, i, j] if bias.dtype == bool else bias[b, h, i, j] > lowest / 2)
                    if not sees:
                        continue
                    score = scale * float(q[b, h, i].astype(np.float64) @ k[b, h // group, j].astype(np.float64))
                    if softcap:
                        score = softcap * math.tanh(score / softcap)
                    if bias is not None and bias.dtype != bool:
                        score += float(bias[b, h, i, j])
                    scores[b, h, i, j] = score
            for i in range(rows):
                running = -math.inf
                for c in range(tile_columns):
                    inside = [s for s in scores[b, h, i, c * bc : (c + 1) * bc] if s > -math.inf]
                    of_tile = max(inside, default=-math.inf)
                    running = max(running, of_tile)
                    if running == -math.inf:
                        continue  # sees nothing up to here: no vote
                    gap[b, h, i // br, c] = max(gap[b, h, i // br, c], of_tile - running)
                    exists[b, h, i // br, c] |= bool(inside)
            for i in range(rows):
                running = -math.inf
                for c in range(tile_columns):
                    of_tile = max(scores[b, h, i, c * bc : (c + 1) * bc])
                    if running > -math.inf and exists[b, h, i // br, c]:
                        after_first += 1
                        rises[0] += of_tile > running + ROUNDING
                        rises[1] += of_tile > running - ROUNDING
                    running = max(running, of_tile)

    kept = np.zeros(shape, bool)
    for b in range(batch):
        for h in range(heads):
            for r in range(tile_rows):
                for c in range(tile_columns):
                    deciding = [h]
                    if unit == "group":
                        deciding = [other for other in range(heads) if other // group == h // group]
                    skipped = all(gap[b, other, r, c] < log_threshold[b] for other in deciding)
                    kept[b, h, r, c] = exists[b, h, r, c] and not skipped

    out = np.zeros((batch, heads, rows, v.shape[-1]))
    pairs = np.zeros(scores.shape, bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                seen = [j for j in range(columns) if kept[b, h, i // br, j // bc] and scores[b, h, i, j] > -math.inf]
                pairs[b, h, i, seen] = True
                if not seen:
                    continue
                logits = [scores[b, h, i, j] for j in seen]
                extra = [] if sinks is None else [float(sinks[h])]
                peak = max(logits + extra)
                total = sum(math.exp(s - peak) for s in logits + extra)
                for j, s in zip(seen, logits, strict=True):
                    out[b, h, i] += math.exp(s - peak) / total * v[b, h // group, j].astype(np.float64)
    correction = (rises[0] / max(after_first, 1), rises[1] / max(after_first, 1))
    return Definition(out, gap, exists, kept, log_threshold, scores > -math.inf, pairs, correction)


def of_call(call: Mapping[str, Any]) -> Definition:
    """The definition of a call as `tests.attention_calls` makes them."""
    given = {name: None if value is None else np.asarray(value) for name, value in call["tensors"].items()}
    scale = given.pop("threshold_scale", None)
    lowest = {"float16": -65504.0}.get(str(given["q"].dtype), float(np.finfo(np.float32).min))
    return define(
        **given, **call["options"], **call["thresholds"], lowest=lowest,
        threshold_scale=1.0 if scale is None else float(scale[0]),
    )  # fmt: skip
