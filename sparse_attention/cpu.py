"""The op on a CPU: tile row by tile row, so that no full score matrix exists and skipped tiles cost no softmax and no PV.

Computes what `sparse_attention.reference` defines. For one tile row of one batch element the scores of all heads are one
batched product; a maximum per tile decides; heads that skip something then gather their kept tiles only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attention.reference import effective_threshold
from sparse_attention.threshold import PhaseThreshold

NEGATIVE_INFINITY = -math.inf


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
    """Output `[B, Hq, Sq, Dv]` in q's dtype and counts `[Hq, 2] int32`; arguments as in the op, one phase's threshold."""
    batch, heads, rows, _ = q.shape
    columns = k.shape[2]
    group = heads // k.shape[1]
    lengths = torch.full((batch,), columns) if kv_lengths is None else kv_lengths.clamp(max=columns)
    lam = effective_threshold(threshold, lengths if kv_lengths is None else kv_lengths, threshold_scale)
    log_threshold = torch.log(lam).tolist()
    starts = [columns - rows] * batch if q_start is None else q_start.tolist()
    valid_rows = [rows] * batch if q_lengths is None else q_lengths.clamp(0, rows).tolist()

    out = torch.zeros(batch, heads, rows, v.shape[-1], dtype=q.dtype)
    counts = torch.zeros(heads, 2, dtype=torch.int64)
    for b in range(batch):
        row_of_tiles = _TileRow(
            k[b].float(), v[b].float(), None if sinks is None else sinks.float(), br=br, bc=bc, group=group,
            is_causal=is_causal, scale=scale, softcap=softcap, window=window, length=int(lengths[b]), start=starts[b],
            log_threshold=log_threshold[b], joint=unit == "group",
        )  # fmt: skip
        per_row_bias = None if bias is None else bias[min(b, bias.shape[0] - 1)]
        for first in range(0, valid_rows[b], br):
            last = min(first + br, valid_rows[b])
            rows_bias = per_row_bias
            if rows_bias is not None and rows_bias.shape[-2] > 1:
                rows_bias = rows_bias[:, first:last]
            result = row_of_tiles(q[b, :, first:last].float(), first, rows_bias, counts)
            if result is not None:
                out[b, :, first:last] = result
    return out, counts.to(torch.int32)


class _TileRow:
    """One batch element's keys and values, against which tile rows of queries are computed one after another."""

    def __init__(
        self, k: Tensor, v: Tensor, sinks: Tensor | None, *, br: int, bc: int, group: int, is_causal: bool, scale: float,
        softcap: float, window: int, length: int, start: int, log_threshold: float, joint: bool,
    ) -> None:  # fmt: skip
        self.k, self.v, self.sinks = k, v, sinks
        self.br, self.bc, self.group = br, bc, group
        self.is_causal, self.scale, self.softcap, self.window = is_causal, scale, softcap, window
        self.length, self.start, self.log_threshold, self.joint = length, start, log_threshold, joint

    def __call__(self, q: Tensor, first: int, bias: Tensor | None, counts: Tensor) -> Tensor | None:
        """`q [Hq, rows, D] float32`, the tile row that starts at query row `first`; adds to `counts [Hq, 2]`."""
        rows = q.shape[1]
        begin, end = self._columns(first, rows)
        if begin >= end:
            return None
        scores = self._scores(q, first, begin, end, bias)
        fully_visible = bias is None and self._every_row_sees_every_tile(first, rows, begin, end)
        keep = self._decide(scores, fully_visible, counts)
        if keep is None:
            return self._softmax_product(scores, self.v[:, begin:end], fully_visible)
        return torch.stack([self._kept_product(scores, h, begin, end, keep[h], fully_visible) for h in range(len(keep))])

    def _columns(self, first: int, rows: int) -> tuple[int, int]:
        """The columns some row can see by position, from a tile's border on."""
        end, begin = self.length, 0
        if self.is_causal:
            end = min(end, first + rows + self.start)
        if self.window:
            begin = max(0, first + self.start - self.window + 1) // self.bc * self.bc
        return begin, end

    def _every_row_sees_every_tile(self, first: int, rows: int, begin: int, end: int) -> bool:
        """By position alone: then no tile is empty for any row and no row is empty."""
        last_tile = begin + (end - begin - 1) // self.bc * self.bc
        causal = not self.is_causal or first + self.start >= last_tile
        oldest = first + rows - 1 + self.start - self.window  # the last column the last row no longer sees
        return causal and (not self.window or oldest < min(begin + self.bc, end) - 1)

    def _scores(self, q: Tensor, first: int, begin: int, end: int, bias: Tensor | None) -> Tensor:
        """Masked scores `[Hq, rows, end - begin]`; heads that share keys are rows of one product."""
        heads, rows, size = q.shape
        keys = self.k[:, begin:end].transpose(-1, -2)
        scores = torch.bmm((q * self.scale).reshape(-1, self.group * rows, size), keys).view(heads, rows, end - begin)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if bias is not None:
            bias = bias[..., begin:end] if bias.shape[-1] > 1 else bias
            visible = bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min / 2
            scores = scores if bias.dtype == torch.bool else scores + bias.float()
            scores = scores.masked_fill(~visible, NEGATIVE_INFINITY)
        position = torch.arange(first + self.start, first + self.start + rows).unsqueeze(-1)
        if self.is_causal:  # only columns beyond the first row's own position can be hidden
            diagonal = min(max(first + self.start + 1, begin), end)
            column = torch.arange(diagonal, end)
            scores[..., diagonal - begin :].masked_fill_(column > position, NEGATIVE_INFINITY)
        if self.window:
            leaving = min(max(first + rows + self.start - self.window, begin), end)
            column = torch.arange(begin, leaving)
            scores[..., : leaving - begin].masked_fill_(column <= position - self.window, NEGATIVE_INFINITY)
        return scores

    def _decide(self, scores: Tensor, fully_visible: bool, counts: Tensor) -> list[list[int]] | None:
        """The kept tiles of each head, or None where every head keeps all."""
        heads, rows, columns = scores.shape
        tiles = -(-columns // self.bc)
        if fully_visible and self.log_threshold == NEGATIVE_INFINITY:
            counts[:, 1] += tiles
            return None
        whole = columns // self.bc * self.bc
        maximum = scores[..., :whole].unflatten(-1, (-1, self.bc)).amax(-1)
        if whole < columns:
            maximum = torch.cat([maximum, scores[..., whole:].amax(-1, keepdim=True)], dim=-1)
        running = maximum.cummax(-1).values
        gap = maximum - running
        if not fully_visible:
            gap = torch.where(running == NEGATIVE_INFINITY, NEGATIVE_INFINITY, gap)
        gap = gap.amax(1)
        if self.joint:
            gap = gap.unflatten(0, (-1, self.group)).amax(1).repeat_interleave(self.group, 0)
        skipped = gap < self.log_threshold
        if fully_visible:
            counts[:, 1] += tiles
        else:
            exists = (maximum > NEGATIVE_INFINITY).any(1)
            skipped = skipped & exists
            counts[:, 1] += exists.sum(-1)
        if not skipped.any():
            return None
        counts[:, 0] += skipped.sum(-1)
        return [head.nonzero().flatten().tolist() for head in ~skipped]

    def _kept_product(
        self, scores: Tensor, head: int, begin: int, end: int, kept: list[int], fully_visible: bool
    ) -> Tensor:
        """One head's output `[rows, Dv]` from its kept tiles only."""
        runs = _runs(kept)
        spans = [(first * self.bc, min(last * self.bc, end - begin)) for first, last in runs]
        values = self.v[head // self.group, begin:end]
        if len(spans) == 1:
            (first, last) = spans[0]
            s, value = scores[head, :, first:last], values[first:last]
        else:
            s = torch.cat([scores[head, :, first:last] for first, last in spans], dim=-1)
            value = torch.cat([values[first:last] for first, last in spans])
        return self._softmax_product(s.unsqueeze(0), value.unsqueeze(0), fully_visible, head)[0]

    def _softmax_product(self, scores: Tensor, values: Tensor, fully_visible: bool, head: int | None = None) -> Tensor:
        """softmax(scores) @ values, `[heads, rows, Dv]`; rows that see nothing give zeros."""
        heads, rows, columns = scores.shape
        if self.sinks is None:
            weight = torch.softmax(scores, dim=-1)
        else:
            sinks = self.sinks if head is None else self.sinks[head : head + 1]
            logits = torch.cat([scores, sinks.view(-1, 1, 1).expand(heads, rows, 1)], dim=-1)
            weight = torch.softmax(logits, dim=-1)[..., :columns]
        if not fully_visible:
            seeing = (scores > NEGATIVE_INFINITY).any(-1, keepdim=True) if self.sinks is None else None
            weight = weight if seeing is None else torch.where(seeing, weight, 0.0)
        shared = values.shape[0]
        return torch.bmm(weight.reshape(shared, -1, columns), values).view(heads, rows, -1)


def _runs(tiles: list[int]) -> list[tuple[int, int]]:
    """Neighbouring tiles as half-open ranges: [0, 1, 4] -> [(0, 2), (4, 5)]."""
    runs: list[tuple[int, int]] = []
    for tile in tiles:
        if runs and runs[-1][1] == tile:
            runs[-1] = (runs[-1][0], tile + 1)
        else:
            runs.append((tile, tile + 1))
    return runs
