"""The definition of block-skip softmax attention, version 1, in plain float32 PyTorch.

Everything else in this project computes what stands here: the CPU op, the ONNX function body, the GPU kernels. It
holds the whole score matrix and is written to be read, not to be fast. The method is BLASST (arXiv:2512.12087); the
interface is that of NVIDIA ModelOpt's `flash_skip_softmax`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attention.threshold import PhaseThreshold, Thresholds

__all__ = [
    "TileDecisions",
    "attention",
    "attention_scores",
    "correction_factor",
    "decide_tiles",
    "effective_threshold",
    "keep_tiles",
    "visible_pairs",
]

NEGATIVE_INFINITY = -math.inf


class TileDecisions(NamedTuple):
    """What was decided for every tile; each field is `[B, Hq, ceil(Sq/br), ceil(Sk/bc)]`.

    `gap` (float32) is the maximum of `m - M` over the rows that vote, -inf where none does; `exists` (bool) tells that
    some row of the tile sees something in it; `kept` (bool) that it exists and is not skipped.
    """

    gap: Tensor
    exists: Tensor
    kept: Tensor

    @property
    def counts(self) -> Tensor:
        """Tiles skipped and tiles that exist per query head, summed over the batch: `[Hq, 2] int32`."""
        skipped = (self.exists & ~self.kept).sum(dim=(0, 2, 3))
        return torch.stack([skipped, self.exists.sum(dim=(0, 2, 3))], dim=-1).to(torch.int32)


def effective_threshold(threshold: PhaseThreshold, lengths: Tensor, scale: Tensor | None = None) -> Tensor:
    """λ of a call per batch element, `[B] float32`: calibrated `a * exp(b * target) / L` where `a > 0`, else static.

    `lengths` is L, `[B]`: the valid keys. `scale`, `[1] float32`, multiplies λ. Anything that is not in [0, 1) when it
    arrives (>= 1, negative, NaN) means dense and becomes 0.
    """
    lengths = lengths.to(torch.float32)
    if threshold.a > 0:
        factor = torch.tensor(threshold.a, dtype=torch.float32) * math.exp(threshold.b * threshold.target)
        value = factor.to(lengths.device) / lengths
    else:
        value = torch.full_like(lengths, threshold.threshold)
    if scale is not None:
        value = value * scale.to(torch.float32)
    return torch.where((value >= 0) & (value < 1), value, 0.0)


def visible_pairs(
    batch: int,
    q_length: int,
    kv_length: int,
    *,
    is_causal: bool = False,
    window: int = 0,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    q_lengths: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which (query row, key column) pairs see each other by position alone: `[B, 1, Sq, Sk] bool`.

    Lengths and starts are `[B]` integers with the defaults `kv_lengths = Sk`, `q_start = Sk - Sq`, `q_lengths = Sq`.
    `window` counts keys including the query's own position; 0 means none.
    """
    row = torch.arange(q_length, device=device).view(1, 1, -1, 1)
    column = torch.arange(kv_length, device=device).view(1, 1, 1, -1)

    def per_batch(value: Tensor | None, default: int) -> Tensor:
        value = torch.full((batch,), default) if value is None else value
        return value.to(device=device, dtype=torch.int64).view(batch, 1, 1, 1)

    position = row + per_batch(q_start, kv_length - q_length)
    visible = (column < per_batch(kv_lengths, kv_length)) & (row < per_batch(q_lengths, q_length))
    if is_causal:
        visible = visible & (column <= position)
    if window:
        visible = visible & (column > position - window)
    return visible


def attention_scores(
    q: Tensor, k: Tensor, visible: Tensor, *, scale: float, softcap: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """Scores in float32, `[B, Hq, Sq, Sk]`, -inf where `visible` or the bias hides the key.

    `q [B, Hq, Sq, D]`, `k [B, Hk, Sk, D]` with `Hq % Hk == 0`; `bias` is boolean (True = attend) or additive, and
    broadcastable to the scores; an additive bias below half its dtype's minimum hides the key.
    """
    group = q.shape[1] // k.shape[1]
    scores = scale * (q.float() @ k.float().repeat_interleave(group, dim=1).transpose(-1, -2))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None and bias.dtype == torch.bool:
        visible = visible & bias
    elif bias is not None:
        visible = visible & (bias > torch.finfo(bias.dtype).min / 2)
        scores = scores + bias.float()
    return scores.masked_fill(~visible, NEGATIVE_INFINITY)


def _pad_to_tiles(values: Tensor, dim: int, size: int, fill: float) -> Tensor:
    """Cuts dimension `dim` into blocks of `size` (the last filled up), as a new dimension behind it."""
    missing = -values.shape[dim] % size
    padding = [0, 0] * (values.dim() - 1 - dim % values.dim()) + [0, missing]
    return torch.nn.functional.pad(values, padding, value=fill).unflatten(dim, (-1, size))


def _row_gaps(scores: Tensor, bc: int) -> tuple[Tensor, Tensor]:
    """Per row and column block `m - M` (-inf where the row does not vote) and M, each `[B, H, Sq, C]`."""
    maximum = _pad_to_tiles(scores, -1, bc, NEGATIVE_INFINITY).amax(-1)
    running = maximum.cummax(-1).values
    # -inf - -inf is NaN: a row that has seen nothing up to here does not vote
    gap = torch.where(running == NEGATIVE_INFINITY, NEGATIVE_INFINITY, maximum - running)
    return gap, maximum


def decide_tiles(scores: Tensor, threshold: Tensor | float, br: int, bc: int, *, group: int = 1) -> TileDecisions:
    """Decides every tile of the scores `[B, H, Sq, Sk] float32` (-inf = invisible).

    A tile is skipped where every row that votes has `m - M < ln λ`, strictly. `threshold` is λ in [0, 1), a number or
    `[B]`; `group > 1` decides jointly over so many neighbouring heads.
    """
    row_gap, maximum = _row_gaps(scores, bc)
    gap = _pad_to_tiles(row_gap, -2, br, NEGATIVE_INFINITY).amax(-2)
    exists = (_pad_to_tiles(maximum, -2, br, NEGATIVE_INFINITY) > NEGATIVE_INFINITY).any(-2)
    if group > 1:
        joint = gap.unflatten(1, (-1, group)).amax(2, keepdim=True)
        gap = joint.expand(-1, -1, group, -1, -1).flatten(1, 2)
    lam = torch.as_tensor(threshold, dtype=torch.float32, device=scores.device).reshape(-1, 1, 1, 1)
    return TileDecisions(gap, exists, exists & ~(gap < torch.log(lam)))


def keep_tiles(scores: Tensor, threshold: float | Tensor, br: int, bc: int) -> Tensor:
    """Which tiles are kept: `[B, H, ceil(Sq/br), ceil(Sk/bc)] bool`; a tile in which nothing is visible is not.

    `scores [B, H, Sq, Sk]` of any floating dtype, invisible ones as -inf or below half the dtype's minimum;
    `threshold` is λ in [0, 1), natural scale; `br`, `bc` are the rows and columns of a tile.
    """
    hidden = scores < torch.finfo(scores.dtype).min / 2
    return decide_tiles(scores.float().masked_fill(hidden, NEGATIVE_INFINITY), threshold, br, bc).kept


def correction_factor(scores: Tensor, br: int, bc: int) -> float:
    """Share of (voting row, existing tile) pairs after a row's first at which the running maximum rises.

    That is how often a flash kernel has to rescale its accumulator. `scores` as in `decide_tiles`.
    """
    maximum = _pad_to_tiles(scores, -1, bc, NEGATIVE_INFINITY).amax(-1)
    running = maximum.cummax(-1).values
    before = torch.nn.functional.pad(running[..., :-1], [1, 0], value=NEGATIVE_INFINITY)
    started = before > NEGATIVE_INFINITY
    exists = (_pad_to_tiles(maximum, -2, br, NEGATIVE_INFINITY) > NEGATIVE_INFINITY).any(-2)
    of_row = exists.repeat_interleave(br, dim=-2)[..., : scores.shape[-2], :]
    pairs = int((started & of_row).sum())
    return int((started & of_row & (maximum > before)).sum()) / pairs if pairs else 0.0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    threshold: float | dict[str, float] | PhaseThreshold | Thresholds,
    br: int = 128,
    bc: int = 128,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    window: int = 0,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    q_lengths: Tensor | None = None,
    sinks: Tensor | None = None,
    unit: str = "head",
    threshold_scale: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, TileDecisions]:
    """Block-skip softmax attention by definition: the output `[B, Hq, Sq, Dv] float32` and every tile's decision.

    Arguments as in `sparse_attention.block_skip_attention`. `kept` replaces the decision by a given one (`[B, Hq, R, C]
    bool`): with it, two implementations are compared on the same tiles.
    """
    batch, heads, rows, _ = q.shape
    columns, group = k.shape[2], q.shape[1] // k.shape[1]
    lengths = kv_lengths if kv_lengths is not None else torch.full((batch,), columns, device=q.device)
    lam = effective_threshold(Thresholds.of(threshold).phase(rows), lengths, threshold_scale)
    visible = visible_pairs(
        batch, rows, columns, is_causal=is_causal, window=window, kv_lengths=kv_lengths, q_start=q_start,
        q_lengths=q_lengths, device=q.device,
    )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = attention_scores(q, k, visible, scale=scale, softcap=softcap, bias=bias)
    br = 1 if rows == 1 else br
    tiles = decide_tiles(scores, lam, br, bc, group=group if unit == "group" else 1)
    if kept is not None:
        tiles = tiles._replace(kept=kept & tiles.exists)

    pairs = tiles.kept.repeat_interleave(br, 2)[:, :, :rows].repeat_interleave(bc, 3)[..., :columns]
    scores = scores.masked_fill(~pairs, NEGATIVE_INFINITY)
    if sinks is not None:
        logit = sinks.float().view(1, heads, 1, 1).expand(batch, heads, rows, 1)
        scores = torch.cat([scores, logit], dim=-1)
    peak = scores.amax(-1, keepdim=True)
    weight = torch.exp(scores - torch.where(peak == NEGATIVE_INFINITY, 0.0, peak))
    total = weight.sum(-1, keepdim=True)
    weight = torch.where(total > 0, weight / total, 0.0)[..., :columns]

    # V of a tile that was not kept never enters the product: not even a NaN in it reaches the output
    out = torch.zeros(batch, heads, rows, v.shape[-1], device=q.device)
    values = v.float().repeat_interleave(group, dim=1)
    valid = torch.arange(columns, device=q.device) < lengths.to(q.device).view(batch, 1)
    for c in range(tiles.kept.shape[-1]):
        block = slice(c * bc, (c + 1) * bc)
        value = values[:, :, block].masked_fill(~valid[:, None, block, None], 0.0)
        takes = pairs[..., c * bc : c * bc + 1]
        out = out + torch.where(takes, weight[..., block] @ value, 0.0)
    return out, tiles
