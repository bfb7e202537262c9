"""The op on a CPU: tile row by tile row; no full score matrix exists, skipped tiles cost no softmax and no PV.

Computes what `sparse_attention.reference` defines. For one tile row the scores of the heads that share keys are one
product; a maximum per tile decides; heads that skip something then gather their kept tiles only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attention.reference import effective_threshold
from sparse_attention.threshold import PhaseThreshold

NEGATIVE_INFINITY = -math.inf
_SCORES_AT_ONCE = 1 << 22
"""Scores computed at once: 16 MiB bounds the memory; smaller pieces were slower (products too small to thread well)."""


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
        self, k: Tensor, v: Tensor, sinks: Tensor | None, *, br: int, bc: int, group: int, is_causal: bool,
        scale: float, softcap: float, window: int, length: int, start: int, log_threshold: float, joint: bool,
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
        fully_visible = bias is None and self._every_row_sees_every_tile(first, rows, begin, end)
        at_once = max(1, _SCORES_AT_ONCE // (self.group * rows * (end - begin)))
        out = []
        for kv_head in range(0, self.k.shape[0], at_once):
            some = slice(kv_head, kv_head + at_once)
            heads = slice(kv_head * self.group, (kv_head + at_once) * self.group)
            k, v = self.k[some, begin:end], self.v[some, begin:end]
            sinks = None if self.sinks is None else self.sinks[heads]
            some_bias = bias[heads] if bias is not None and bias.shape[0] > 1 else bias
            scores = self._scores(q[heads], k, first, begin, end, some_bias)
            keep = self._decide(scores, fully_visible, counts[heads])
            if keep is None:
                out.append(_softmax_product(scores, v, sinks, fully_visible))
                continue
            for h, kept in enumerate(keep):
                columns = self._columns_of(kept, end - begin)
                sink = None if sinks is None else sinks[h : h + 1]
                value = v[h // self.group].unsqueeze(0)
                out.append(
                    _softmax_product(
                        _take(scores[h : h + 1], columns, -1), _take(value, columns, 1), sink, fully_visible
                    )
                )
        return torch.cat(out)

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

    def _scores(self, q: Tensor, k: Tensor, first: int, begin: int, end: int, bias: Tensor | None) -> Tensor:
        """Masked scores `[heads, rows, end - begin]`; heads that share keys are rows of one product."""
        heads, rows, size = q.shape
        queries = (q * self.scale).reshape(-1, self.group * rows, size)
        scores = torch.matmul(queries, k.transpose(-1, -2)).view(heads, rows, end - begin)
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
        columns = scores.shape[-1]
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

    def _columns_of(self, tiles: list[int], columns: int) -> list[slice]:
        """The columns of the given tiles, neighbouring tiles joined into one slice."""
        runs: list[list[int]] = []
        for tile in tiles:
            if runs and runs[-1][1] == tile:
                runs[-1][1] = tile + 1
            else:
                runs.append([tile, tile + 1])
        return [slice(first * self.bc, min(last * self.bc, columns)) for first, last in runs]


def _take(values: Tensor, columns: list[slice], dim: int) -> Tensor:
    parts = [values[..., c] if dim == -1 else values[:, c] for c in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _softmax_product(scores: Tensor, values: Tensor, sinks: Tensor | None, fully_visible: bool) -> Tensor:
    """softmax(scores) @ values, `[heads, rows, Dv]`; rows that see nothing give zeros.

    `scores [heads, rows, columns]`, `values [kv heads, columns, Dv]`, `sinks [heads]` join the denominator only.
    """
    heads, rows, columns = scores.shape
    if sinks is None:
        weight = torch.softmax(scores, dim=-1)
        if not fully_visible:
            weight = weight.masked_fill(~(scores > NEGATIVE_INFINITY).any(-1, keepdim=True), 0.0)
    else:
        logits = torch.cat([scores, sinks.view(-1, 1, 1).expand(heads, rows, 1)], dim=-1)
        weight = torch.softmax(logits, dim=-1)[..., :columns]
    shared = values.shape[0]
    return torch.matmul(weight.reshape(shared, -1, columns), values).view(heads, rows, -1)
