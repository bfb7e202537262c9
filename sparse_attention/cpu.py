"""The op on a CPU: tile row by tile row; no full score matrix exists, skipped tiles cost no softmax and no PV.

Computes what `sparse_attention.reference` defines. For one tile row the scores of the heads that share keys are one
product; a maximum per tile decides; heads that skip something then gather their kept tiles only.
"""

from __future__ import annotations

import math
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from sparse_attention.reference import effective_threshold
from sparse_attention.threshold import PhaseThreshold

NEGATIVE_INFINITY = -math.inf
_SCORES_AT_ONCE = 1 << 22
"""Scores computed at once where they are of several K/V heads: 16 MiB, few operations and still in a cache."""
_ROWS_OF_A_PIECE = 96
"""What a thread has of a product at a time, at least; two threads, 384 x 64 x 2048: 96 beat 192 and 64."""


def block_skip_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kv_lengths: Tensor | None,
    q_start: Tensor | None,
    q_lengths: Tensor | None,
    sinks: Tensor | None,
    threshold_scale: Tensor | None,
    *,
    threshold: PhaseThreshold,
    br: int,
    bc: int,
    is_causal: bool,
    scale: float,
    softcap: float,
    window: int,
    unit: str,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Sq, Dv]` in q's dtype and counts `[Hq, 2] int32`; arguments as in the op, for one phase."""
    batch, heads, rows, _ = q.shape
    columns = k.shape[2]
    group = heads // k.shape[1]
    lengths = torch.full((batch,), columns) if kv_lengths is None else kv_lengths.clamp(max=columns)
    lam = effective_threshold(threshold, lengths if kv_lengths is None else kv_lengths, threshold_scale)
    log_threshold = torch.log(lam).tolist()
    starts = [columns - rows] * batch if q_start is None else q_start.tolist()
    valid_rows = [rows] * batch if q_lengths is None else q_lengths.clamp(0, rows).tolist()

    out = torch.zeros(batch, heads, rows, v.shape[-1], dtype=q.dtype)
    counts = [[0, 0] for _ in range(heads)]
    for b in range(batch):
        row_of_tiles = _TileRow(
            k[b], v[b], None if sinks is None else sinks.float(), br=br, bc=bc, group=group,
            is_causal=is_causal, scale=scale, softcap=softcap, window=window, length=int(lengths[b]), start=starts[b],
            log_threshold=log_threshold[b], joint=unit == "group",
        )  # fmt: skip
        per_row_bias = None if bias is None else bias[min(b, bias.shape[0] - 1)]
        for first in range(0, valid_rows[b], br):
            last = min(first + br, valid_rows[b])
            rows_bias = per_row_bias
            if rows_bias is not None and rows_bias.shape[-2] > 1:
                rows_bias = rows_bias[:, first:last]
            row_of_tiles(q[b, :, first:last].float(), first, rows_bias, counts, out[b, :, first:last])
    return out, torch.tensor(counts, dtype=torch.int32)


class _TileRow:
    """One batch element's keys and values, against which tile rows of queries are computed one after another.

    K and V are filled up to whole tiles; what lies beyond `length` is never read. The scores of all tile rows go
    through the same buffer, those of kept tiles through a second: fresh memory for each would cost more than the
    arithmetic.
    """

    def __init__(
        self, k: Tensor, v: Tensor, sinks: Tensor | None, *, br: int, bc: int, group: int, is_causal: bool,
        scale: float, softcap: float, window: int, length: int, start: int, log_threshold: float, joint: bool,
    ) -> None:  # fmt: skip
        self.k, self.v = (_whole_tiles(x[:, :length].float(), bc) for x in (k, v))
        self.sinks = sinks
        self.bc, self.group = bc, group
        self.is_causal, self.scale, self.softcap, self.window = is_causal, scale, softcap, window
        self.length, self.start, self.log_threshold, self.joint = length, start, log_threshold, joint
        self._beyond: dict[tuple[int, int, int], Tensor] = {}
        of_one_kv_head = group * br * self.k.shape[1]
        self.at_once = max(1, min(len(k), _SCORES_AT_ONCE // max(of_one_kv_head, 1)))
        self.scores, self.kept_scores = torch.empty(2, self.at_once * of_one_kv_head)

    def __call__(self, q: Tensor, first: int, bias: Tensor | None, counts: list[list[int]], out: Tensor) -> None:
        """One tile row: `q [Hq, rows, D] float32` from query row `first` on; adds to `counts`, fills `out`."""
        heads, rows, size = q.shape
        begin, end = self._columns(first, rows)
        if begin >= end:
            return
        sees_all = bias is None and self._every_row_sees_every_tile(first, rows, begin, end)
        kv_heads = len(self.k)
        q = (q * self.scale).reshape(kv_heads, -1, size)  # heads that share keys are rows of one product
        product = q.new_empty(kv_heads, q.shape[1], out.shape[-1])
        for kv_head in range(0, kv_heads, self.at_once):
            some = slice(kv_head, kv_head + self.at_once)
            of_some = slice(some.start * self.group, some.stop * self.group)
            some_bias = bias[of_some] if bias is not None and bias.shape[0] > 1 else bias
            sinks = None if self.sinks is None else self.sinks[of_some]
            v = self.v[some, begin:end]
            scores = self._scores(q[some], self.k[some, begin:end], rows, first, begin, some_bias)
            skipped = self._decide(scores, sees_all, counts[of_some])
            if skipped is None:
                _product(_softmax(scores, sinks, sees_all).view(len(v), -1, end - begin), v, product[some])
            else:
                self._kept_product(scores, v, sinks, sees_all, skipped, product[some])
        out.copy_(product.view(heads, rows, -1))

    def _columns(self, first: int, rows: int) -> tuple[int, int]:
        """The columns some row can see by position, from one border of tiles to another."""
        begin, end = 0, self.length
        if self.is_causal:
            end = min(end, first + rows + self.start)
        if self.window:
            begin = max(0, first + self.start - self.window + 1) // self.bc * self.bc
        return begin, -(-end // self.bc) * self.bc

    def _every_row_sees_every_tile(self, first: int, rows: int, begin: int, end: int) -> bool:
        """By position alone: then no tile is empty for any row and no row is empty."""
        causal = not self.is_causal or first + self.start >= end - self.bc
        oldest = first + rows - 1 + self.start - self.window  # the last column the last row no longer sees
        return causal and (not self.window or oldest < min(begin + self.bc, self.length) - 1)

    def _scores(self, q: Tensor, k: Tensor, rows: int, first: int, begin: int, bias: Tensor | None) -> Tensor:
        """Masked scores `[heads, rows, columns]` of `q [kv heads, group * rows, D]` and `k [kv heads, columns, D]`."""
        columns = k.shape[1]
        scores = self.scores[: len(k) * q.shape[1] * columns].view(len(k), -1, columns)
        _product(q, k.transpose(-1, -2), scores)
        scores = scores.view(-1, rows, columns)
        if self.softcap:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if bias is not None:
            seen = min(columns, self.length - begin)
            bias = bias[..., begin : begin + seen] if bias.shape[-1] > 1 else bias
            if bias.dtype == torch.bool:
                visible = bias
            else:
                visible = bias > torch.finfo(bias.dtype).min / 2
                scores[..., :seen].add_(bias)
            scores[..., :seen].masked_fill_(~visible, NEGATIVE_INFINITY)
        if begin + columns > self.length:
            scores[..., max(self.length - begin, 0) :] = NEGATIVE_INFINITY
        position = first + self.start - begin  # of the first row, among these columns
        if self.is_causal:  # only columns beyond the first row's own position can be hidden
            diagonal = min(max(position + 1, 0), columns)
            hidden = self._columns_beyond(position - diagonal, rows, columns - diagonal)
            scores[..., diagonal:].masked_fill_(hidden, NEGATIVE_INFINITY)
        if self.window:
            leaving = min(max(position + rows - self.window, 0), columns)
            hidden = ~self._columns_beyond(position - self.window, rows, leaving)
            scores[..., :leaving].masked_fill_(hidden, NEGATIVE_INFINITY)
        return scores

    def _columns_beyond(self, position: int, rows: int, columns: int) -> Tensor:
        """`[rows, columns] bool`: the column lies behind `position + row`; the same for nearly every tile row."""
        key = position, rows, columns
        if key not in self._beyond:
            row, column = torch.arange(rows).unsqueeze(-1), torch.arange(columns)
            self._beyond = {key: column > position + row}
        return self._beyond[key]

    def _decide(self, scores: Tensor, sees_all: bool, counts: list[list[int]]) -> list[list[bool]] | None:
        """Which tiles each head skips, `[heads][C]`, or None where every head keeps all."""
        if sees_all:
            for count in counts:
                count[1] += scores.shape[-1] // self.bc
            if self.log_threshold == NEGATIVE_INFINITY:
                return None
        maximum = scores.unflatten(-1, (-1, self.bc)).amax(-1)
        running = maximum.cummax(-1).values
        gap = maximum - running
        if not sees_all:  # -inf - -inf is NaN: a row that has seen nothing up to here does not vote
            gap = torch.where(running == NEGATIVE_INFINITY, NEGATIVE_INFINITY, gap)
        gap = gap.max(1).values  # amax is slower over a dimension in the middle
        if self.joint:
            gap = gap.unflatten(0, (-1, self.group)).amax(1).repeat_interleave(self.group, 0)
        skips = gap < self.log_threshold
        if not sees_all:
            exists = (maximum > NEGATIVE_INFINITY).any(1)
            skips &= exists
            for count, number in zip(counts, exists.sum(-1).tolist(), strict=True):
                count[1] += number
        skipped: list[list[bool]] = skips.tolist()
        for count, head in zip(counts, skipped, strict=True):
            count[0] += sum(head)
        return skipped if any(map(any, skipped)) else None

    def _kept_product(
        self, scores: Tensor, v: Tensor, sinks: Tensor | None, sees_all: bool, skipped: list[list[bool]], out: Tensor
    ) -> None:
        """`out [kv heads, group * rows, Dv]` from the kept tiles only, which are gathered first.

        Neighbouring heads that share keys and keep the same tiles are rows of one product.
        """
        heads, rows, _ = scores.shape
        tiles, values = scores.unflatten(-1, (-1, self.bc)), v.unflatten(1, (-1, self.bc))
        out = out.view(heads, rows, -1)
        for (kv_head, pattern), alike in groupby(range(heads), lambda head: (head // self.group, skipped[head])):
            first, *others = alike
            same = slice(first, first + 1 + len(others))
            weights, value = scores[same], v[kv_head]
            if any(pattern):
                index = torch.tensor([tile for tile, skip in enumerate(pattern) if not skip])
                kept = self.kept_scores[: len(weights) * rows * len(index) * self.bc]
                gathered = kept.view(len(weights), rows, -1, self.bc)
                weights = torch.index_select(tiles[same], 2, index, out=gathered).flatten(2)
                value = values[kv_head].index_select(0, index).flatten(0, 1)
            weights = _softmax(weights, None if sinks is None else sinks[same], sees_all)
            _large_product(weights.flatten(0, 1), value, out[same].flatten(0, 1))


def _whole_tiles(x: Tensor, bc: int) -> Tensor:
    """`[heads, length, size]` filled up with zeros to a multiple of `bc`; no copy where it is one already.

    Every megabyte less is felt: past a limit the allocator returns freed memory, and each call faults it in anew.
    """
    missing = -x.shape[1] % bc
    return functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def _softmax(scores: Tensor, sinks: Tensor | None, sees_all: bool) -> Tensor:
    """softmax(scores) of `[heads, rows, columns]`, in their place; rows that see nothing give zeros.

    `sinks [heads]` join the denominator only.
    """
    if sinks is not None:
        logits = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=-1)
        return scores.copy_(torch.softmax(logits, dim=-1)[..., :-1])
    seen = None if sees_all else scores.amax(-1, keepdim=True) > NEGATIVE_INFINITY
    torch.softmax(scores, dim=-1, out=scores)
    return scores if seen is None else scores.masked_fill_(~seen, 0.0)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, batched."""
    if a.shape[1] < _ROWS_OF_A_PIECE:
        torch.bmm(a, b, out=out)
    else:
        for rows, matrix, result in zip(a, b, out, strict=True):
            _large_product(rows, matrix, result)


def _large_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b` of matrices, as pieces of the rows of `a`, equally many a thread.

    Left to itself the library splits Q K by columns and the softmax splits by rows: the cores then exchange all scores.
    """
    rows, threads = len(a), torch.get_num_threads()
    most = rows // _ROWS_OF_A_PIECE // threads * threads if threads > 1 else 0
    pieces = next((n for n in range(most, 0, -threads) if rows % n == 0), 1)
    if pieces == 1:
        torch.mm(a, b, out=out)
    else:
        torch.bmm(a.unflatten(0, (pieces, -1)), b.expand(pieces, -1, -1), out=out.unflatten(0, (pieces, -1)))
