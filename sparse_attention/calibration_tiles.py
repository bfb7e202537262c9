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
_SCORES_AT_ONCE = {"cpu": 1 << 20}
"""Scores held at once: 4 MiB on a CPU (its caches), 1 GiB elsewhere."""


@dataclass(frozen=True)
class TileRow:
    """One row of tiles of one sequence, in every query head.

    Args:
        batch: which sequence.
        first: the first row's index among the queries.
        kv_length: valid keys of the sequence.
        end: position one past the last row's: the keys that a causal prefill of that length would have.
        gap: `m - M` per query row, -inf where the row does not vote; `[Hq, rows, C] float32`.
        exists: tiles in which some row sees something; `[Hq, C] bool`.
        mass: softmax share of the tile in each row; `[Hq, rows, C] float32`.
        columns: visible columns of the tile by position, `[C]` counts of keys, the last tile may be shorter.
    """

    batch: int
    first: int
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
    batch, _, rows, _ = call.q.shape
    columns = call.k.shape[2]
    br = 1 if rows == 1 else br
    lengths = _per_sequence(call.kv_lengths, columns, batch, columns)
    starts = _per_sequence(call.q_start, columns - rows, batch)
    valid_rows = _per_sequence(call.q_lengths, rows, batch, rows)
    run = _Run(call, min(br, rows), bc)
    for b in range(batch):
        for first in range(0, valid_rows[b], br):
            row = run.tile_row(b, slice(first, min(first + br, valid_rows[b])), lengths[b], starts[b])
            if row is not None:
                visit(row)
    return run.out


class _Run:
    """One call. All scores go through the same memory: fresh memory for each row would cost more than what is counted.

    A few K/V heads at a time, so that on a CPU the passes over their scores find them in the cache.
    """

    def __init__(self, call: AttentionCall, br: int, bc: int) -> None:
        self.call, self.bc = call, bc
        self.k, self.v = call.k.float(), call.v.float()
        batch, heads, rows, _ = call.q.shape
        kv_heads, columns = call.k.shape[1:3]
        self.group = heads // kv_heads
        of_one = self.group * br * columns
        self.at_once = max(1, min(kv_heads, _SCORES_AT_ONCE.get(call.q.device.type, 1 << 28) // max(of_one, 1)))
        self.scores = torch.empty(self.at_once * of_one, device=call.q.device)
        self.out = torch.zeros(batch, heads, rows, call.v.shape[-1], dtype=call.q.dtype, device=call.q.device)

    def tile_row(self, b: int, rows: slice, length: int, start: int) -> TileRow | None:
        """Fills `out` in these rows, and says what is in their tiles; None where they see nothing by position."""
        call, bc = self.call, self.bc
        end = min(length, rows.stop + start) if call.is_causal else length
        begin = max(0, rows.start + start - call.window + 1) // bc * bc if call.window else 0
        if begin >= end:
            return None
        shape = call.q.shape[1], rows.stop - rows.start, -(-end // bc)
        # tiles before a window's stay as they are here: no row sees anything there
        maximum = torch.full(shape, NEGATIVE_INFINITY, device=call.q.device)
        mass = torch.zeros(shape, device=call.q.device)
        for kv_head in range(0, call.k.shape[1], self.at_once):
            some = slice(kv_head, min(kv_head + self.at_once, call.k.shape[1]))
            heads = slice(some.start * self.group, some.stop * self.group)
            scores = self._scores(b, heads, some, rows, begin, end, start)
            _by_tile(scores, bc, "amax", maximum[heads, :, begin // bc :])
            peak = maximum[heads].amax(-1, keepdim=True)
            weight = _softmax(scores, None if call.sinks is None else call.sinks[heads], peak)
            _by_tile(weight, bc, "sum", mass[heads, :, begin // bc :])
            value = self.v[b, some, begin:end]
            product = _product(weight.reshape(len(value), -1, end - begin), value)
            self.out[b, heads, rows] = product.view(weight.shape[0], weight.shape[1], -1).to(self.out.dtype)
        running = maximum.cummax(-1).values
        gap = (maximum - running).masked_fill_(running == NEGATIVE_INFINITY, NEGATIVE_INFINITY)
        exists = (maximum != NEGATIVE_INFINITY).any(1)  # NaN exists too: a check looks for it
        sizes = (end - torch.arange(0, end, bc)).clamp(max=bc)
        return TileRow(b, rows.start, length, rows.stop + start, gap, exists, mass, sizes)

    def _scores(self, b: int, heads: slice, kv_heads: slice, rows: slice, begin: int, end: int, start: int) -> Tensor:
        """Masked scores `[H, rows, end - begin] float32`; heads that share keys are rows of one product."""
        call, columns = self.call, end - begin
        k, q = self.k[b, kv_heads, begin:end], call.q[b, heads, rows].float() * call.scale
        scores = self.scores[: q.shape[0] * q.shape[1] * columns].view(len(k), -1, columns)
        _product(q.reshape(len(k), -1, q.shape[-1]), k.transpose(-1, -2), scores)
        scores = scores.view(q.shape[0], q.shape[1], columns)
        if call.softcap:
            scores.div_(call.softcap).tanh_().mul_(call.softcap)
        if call.bias is not None:
            bias = call.bias[min(b, call.bias.shape[0] - 1)]
            bias = bias[heads] if bias.shape[0] > 1 else bias
            bias = bias[:, rows] if bias.shape[1] > 1 else bias
            bias = bias[..., begin:end] if bias.shape[2] > 1 else bias
            visible = bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min / 2
            if bias.dtype != torch.bool:
                scores.add_(bias.float())
            scores.masked_fill_(~visible, NEGATIVE_INFINITY)
        position = torch.arange(rows.start + start, rows.stop + start, device=scores.device).unsqueeze(-1)
        if call.is_causal:  # only columns beyond the first row's own position can be hidden
            first = min(max(rows.start + start + 1, begin), end)
            column = torch.arange(first, end, device=scores.device)
            scores[..., first - begin :].masked_fill_(column > position, NEGATIVE_INFINITY)
        if call.window:
            last = min(max(rows.stop + start - call.window, begin), end)
            column = torch.arange(begin, last, device=scores.device)
            scores[..., : last - begin].masked_fill_(column <= position - call.window, NEGATIVE_INFINITY)
        return scores


def _softmax(scores: Tensor, sinks: Tensor | None, peak: Tensor) -> Tensor:
    """Softmax over the columns, in place where it can be; rows that see nothing (`peak` is -inf) give 0.

    `sinks [H]` join the denominator.
    """
    if sinks is None:
        weight = torch.softmax(scores, dim=-1, out=scores)
    else:
        logit = sinks.float().view(-1, 1, 1).expand(*scores.shape[:2], 1)
        weight = torch.softmax(torch.cat([scores, logit], dim=-1), dim=-1)[..., :-1]
    empty = peak == NEGATIVE_INFINITY
    return weight.masked_fill(empty, 0.0) if bool(empty.any()) else weight


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b`, batched; a single product is threaded better by itself than as a batch of one."""
    if len(a) > 1:
        return torch.bmm(a, b, out=out)
    return torch.mm(a[0], b[0], out=None if out is None else out[0]).unsqueeze(0)


def _by_tile(values: Tensor, bc: int, reduction: str, out: Tensor) -> None:
    """`[H, rows, columns]` reduced over blocks of `bc` columns, the last may be shorter, into `out [H, rows, C]`."""
    whole = values.shape[-1] // bc
    if whole:
        blocks = values[..., : whole * bc].unflatten(-1, (whole, bc))
        out[..., :whole] = blocks.amax(-1) if reduction == "amax" else blocks.sum(-1)
    if whole * bc < values.shape[-1]:
        rest = values[..., whole * bc :]
        out[..., whole] = rest.amax(-1) if reduction == "amax" else rest.sum(-1)


def _per_sequence(values: Tensor | None, default: int, batch: int, most: int | None = None) -> list[int]:
    given = [default] * batch if values is None else values.tolist()
    return given if most is None else [min(max(value, 0), most) for value in given]
