"""Inputs whose skipped tiles are known: rows look along one of two directions, and a tile of keys may carry either.

Random Gaussian inputs skip nothing at 128 x 128, so a test on them proves nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_attention.reference import attention_scores, visible_pairs

COLUMNS = 128
THRESHOLD = 1e-3
"""λ that separates planted tiles (score about 14) from the others (about 0) by several units on both sides."""

WIDE_KERNELS = [(64, 64), (64, 128), (128, 64)]
"""Head size and br for which Hopper has kernels of their own for calls with many rows,"""
WIDE_CALLS = [(129, 203), (191, 64), (761, 100), (761, 3000), (1200, 1200)]
"""and rows and keys of calls that they run, with 128 heads in the batch."""


def planted(
    batch: int, heads: int, kv_heads: int, rows: int, columns: int, size: int, *, value_size: int | None = None,
    keep: float = 0.4, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str = "cuda", split: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q `[B, Hq, rows, size]`, k `[B, Hk, columns, size]`, v `[B, Hk, columns, value_size]`.

    Each tile of 128 keys is wanted with probability `keep` by the even and, independently, by the odd blocks of `split`
    rows; `split=0` makes all rows want the same tiles. The first tile is wanted by all.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    directions = torch.zeros(2, size, device=device)
    directions[0, 0::4] = directions[1, 1::4] = 1 / math.sqrt(size / 4)
    side = torch.zeros(rows, dtype=torch.long, device=device)
    if split:
        side = torch.arange(rows, device=device) // split % 2
    q = normal(batch, heads, rows, size) + 8 * directions[side]
    tiles = -(-columns // COLUMNS)
    wanted = torch.rand(batch, kv_heads, tiles, 2, device=device, generator=generator) < keep
    wanted[:, :, 0] = True
    amplitude = 14 * math.sqrt(size) / 8
    carried = amplitude * torch.einsum("bhts,sd->bhtd", wanted.float(), directions)
    k = normal(batch, kv_heads, columns, size) + carried.repeat_interleave(COLUMNS, 2)[:, :, :columns]
    v = normal(batch, kv_heads, columns, value_size or size)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def rising(
    batch: int, heads: int, rows: int, columns: int, size: int, *, step: float = 12.0,
    dtype: torch.dtype = torch.bfloat16, device: str = "cuda",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v of which every third row's scores rise by about `step` from tile to tile, the others' rise or fall.

    So a running maximum outgrows in every tile whatever exponents were relative to.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(batch, heads, n, size, device=device, generator=generator) for n in (rows, columns, columns))
    direction = torch.zeros(size, device=device)
    direction[::4] = 1 / math.sqrt(size / 4)
    q[:, :, ::3] += 8 * direction
    tile = torch.arange(columns, device=device) // COLUMNS
    k += (step * math.sqrt(size) / 8 * tile)[:, None] * direction
    return q.to(dtype), k.to(dtype), v.to(dtype)


def below_zero(q: Tensor, k: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """q, k of `planted` with the scores of every so many rows lower by about 30, so that all are negative.

    Nothing else changes: not which tiles are wanted.
    """
    q, k = q.clone(), k.clone()
    q[..., 3], k[..., 3] = 0.0, -30 * math.sqrt(q.shape[-1]) / 8  # a column that no direction uses
    q[:, :, ::every, 3] = 8.0
    return q, k


def planted_heads(
    batch: int, kv_heads: int, group: int, rows: int, columns: int, size: int, *, split: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q `[B, kv_heads * group, rows, size]`, k, v: of a group's heads, neighbours want different tiles.

    `split` is how many (head, row) pairs of a group in turn look the same way: by default the rows of a head.
    """
    q, k, v = planted(batch, kv_heads, kv_heads, group * rows, columns, size, split=split or rows, **options)
    return q.view(batch, kv_heads * group, rows, size), k, v


def log_sum_of_kept(q: Tensor, k: Tensor, kept: Tensor, br: int, is_causal: bool) -> Tensor:
    """Log-sum-exp over what a row sees of the kept tiles, `[B, Hq, Sq] float32`; `kept [B, Hq, row, column blocks]`."""
    rows, columns = q.shape[2], k.shape[2]
    visible = visible_pairs(q.shape[0], rows, columns, is_causal=is_causal, device=q.device)
    scores = attention_scores(q, k, visible, scale=q.shape[3] ** -0.5)
    wanted = kept.repeat_interleave(br, 2)[:, :, :rows].repeat_interleave(COLUMNS, 3)[..., :columns]
    return scores.masked_fill(~wanted, -math.inf).logsumexp(-1)
