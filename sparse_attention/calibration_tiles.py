"""Dense attention that shows every tile's gap and softmax mass while it computes: what calibration collects from.

One pass over q and k gives the output, the gaps that decide (`sparse_attention.reference`) and the share of the softmax
that skipping a tile would drop. Runs on the device of its inputs, tile row by tile row, without a full score matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attention.layer import AttentionCall

NEGATIVE_INFINITY = -math.inf
_SCORES_AT_ONCE = {"cpu": 1 << 22}
"""Scores held at once: 16 MiB on a CPU (its caches), 1 GiB elsewhere."""


@dataclass(frozen=True)
class TileRow:
    """One row of tiles of one sequence, for some query heads.

    Args:
        batch: which sequence.
        heads: which query heads.
        kv_length: valid keys of the sequence.
        end: position one past the last row's: the keys that a causal prefill of that length would have.
        gap: `m - M` per query row, -inf where the row does not vote; `[H, rows, C] float32`.
        exists: tiles in which some row sees something; `[H, C] bool`.
        mass: softmax share of the tile in each row; `[H, rows, C] float32`.
        columns: visible columns of the tile by position, `[C]` counts of keys, the last tile may be shorter.
    """

    batch: int
    heads: slice
    kv_length: int
    end: int
    gap: Tensor
    exists: Tensor
    mass: Tensor
    columns: Tensor


def dense_attention(call: AttentionCall, br: int, bc: int, visit: Callable[[TileRow], None]) -> Tensor:
    """Attention without skipping, `[B, Hq, Sq, Dv]` in q's dtype; `visit` sees every row of tiles on the way.

    `call` as the op takes it; tiles of `br` rows (1 where Sq is 1) and `bc` columns.
    """
    batch, heads, rows, _ = call.q.shape
    columns, device = call.k.shape[2], call.q.device
    br = 1 if rows == 1 else br
    lengths = _per_sequence(call.kv_lengths, columns, batch, columns)
    starts = _per_sequence(call.q_start, columns - rows, batch)
    valid_rows = _per_sequence(call.q_lengths, rows, batch, rows)
    out = torch.zeros(batch, heads, rows, call.v.shape[-1], dtype=call.q.dtype, device=device)
    for b in range(batch):
        for first in range(0, valid_rows[b], br):
            _tile_row(call, b, slice(first, min(first + br, valid_rows[b])), lengths[b], starts[b], bc, visit, out)
    return out


def _tile_row(
    call: AttentionCall, b: int, rows: slice, length: int, start: int, bc: int, visit: Callable[[TileRow], None],
    out: Tensor,
) -> None:  # fmt: skip
    group = call.q.shape[1] // call.k.shape[1]
    end = min(length, rows.stop + start) if call.is_causal else length
    begin = max(0, rows.start + start - call.window + 1) // bc * bc if call.window else 0
    if begin >= end:
        return
    limit = _SCORES_AT_ONCE.get(call.q.device.type, 1 << 28)
    at_once = max(1, limit // (group * (rows.stop - rows.start) * (end - begin)))
    for kv_head in range(0, call.k.shape[1], at_once):
        some = slice(kv_head, min(kv_head + at_once, call.k.shape[1]))
        heads = slice(some.start * group, some.stop * group)
        scores = _scores(call, b, heads, some, rows, begin, end, start)
        maximum = _by_tile(scores, bc, "amax")
        running = maximum.cummax(-1).values
        gap = torch.where(running == NEGATIVE_INFINITY, NEGATIVE_INFINITY, maximum - running)
        weight = _softmax(scores, None if call.sinks is None else call.sinks[heads], running[..., -1:])
        out[b, heads, rows] = _product(weight, call.v[b, some, begin:end], group).to(out.dtype)
        missing = begin // bc  # tiles before a window's: no row sees anything there
        gap, maximum, mass = (
            torch.nn.functional.pad(values, (missing, 0), value=fill)
            for values, fill in (
                (gap, NEGATIVE_INFINITY),
                (maximum, NEGATIVE_INFINITY),
                (_by_tile(weight, bc, "sum"), 0.0),
            )
        )
        sizes = (end - torch.arange(0, end, bc)).clamp(max=bc)
        exists = (maximum != NEGATIVE_INFINITY).any(1)  # NaN exists too: a check looks for it
        visit(TileRow(b, heads, length, rows.stop + start, gap, exists, mass, sizes))


def _scores(
    call: AttentionCall, b: int, heads: slice, kv_heads: slice, rows: slice, begin: int, end: int, start: int
) -> Tensor:
    """Masked scores `[H, rows, end - begin] float32`; heads that share keys are rows of one product."""
    q, k = call.q[b, heads, rows], call.k[b, kv_heads, begin:end]
    size, device = q.shape[-1], q.device
    queries = (q.float() * call.scale).reshape(k.shape[0], -1, size)
    scores = torch.matmul(queries, k.float().transpose(-1, -2)).view(q.shape[0], q.shape[1], end - begin)
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        bias = call.bias[min(b, call.bias.shape[0] - 1)]
        bias = bias[heads] if bias.shape[0] > 1 else bias
        bias = bias[:, rows] if bias.shape[1] > 1 else bias
        bias = bias[..., begin:end] if bias.shape[2] > 1 else bias
        visible = bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min / 2
        scores = scores if bias.dtype == torch.bool else scores + bias.float()
        scores = scores.masked_fill(~visible, NEGATIVE_INFINITY)
    position = torch.arange(rows.start + start, rows.stop + start, device=device).unsqueeze(-1)
    if call.is_causal:  # only columns beyond the first row's own position can be hidden
        first = min(max(rows.start + start + 1, begin), end)
        column = torch.arange(first, end, device=device)
        scores[..., first - begin :].masked_fill_(column > position, NEGATIVE_INFINITY)
    if call.window:
        last = min(max(rows.stop + start - call.window, begin), end)
        column = torch.arange(begin, last, device=device)
        scores[..., : last - begin].masked_fill_(column <= position - call.window, NEGATIVE_INFINITY)
    return scores


def _softmax(scores: Tensor, sinks: Tensor | None, peak: Tensor) -> Tensor:
    """Softmax over the columns; `sinks [H]` join the denominator; rows that see nothing (`peak` is -inf) give 0."""
    if sinks is None:
        weight = torch.softmax(scores, dim=-1)
    else:
        logit = sinks.float().view(-1, 1, 1).expand(*scores.shape[:2], 1)
        weight = torch.softmax(torch.cat([scores, logit], dim=-1), dim=-1)[..., :-1]
    empty = peak == NEGATIVE_INFINITY
    return weight.masked_fill(empty, 0.0) if bool(empty.any()) else weight


def _product(weight: Tensor, values: Tensor, group: int) -> Tensor:
    heads, rows, columns = weight.shape
    return torch.matmul(weight.reshape(heads // group, group * rows, columns), values.float()).view(heads, rows, -1)


def _by_tile(values: Tensor, bc: int, reduction: str) -> Tensor:
    """`[H, rows, columns]` reduced over blocks of `bc` columns, the last may be shorter: `[H, rows, C]`."""
    whole = values.shape[-1] // bc * bc
    blocks = [values[..., :whole].unflatten(-1, (-1, bc))] if whole else []
    if whole < values.shape[-1]:
        blocks.append(values[..., whole:].unsqueeze(-2))
    parts = [block.amax(-1) if reduction == "amax" else block.sum(-1) for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _per_sequence(values: Tensor | None, default: int, batch: int, most: int | None = None) -> list[int]:
    given = [default] * batch if values is None else values.tolist()
    return given if most is None else [min(max(value, 0), most) for value in given]
