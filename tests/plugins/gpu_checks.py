"""Running the compiled kernels on the GPU, and comparing them with the definition."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_attention import native
from sparse_attention.reference import TileDecisions, attention

BAND = 5e-4
"""Kernel and definition sum the same products in float32, scores of about 14: they differ by a tenth of this."""


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, counts and log-sum-exp; all poisoned before the launch."""
    batch, heads, rows, _ = q.shape
    out = torch.full((batch, heads, rows, v.shape[3]), float("nan"), dtype=q.dtype, device="cuda")
    counts = torch.full((heads, 2), -7, dtype=torch.int32, device="cuda")
    lse = torch.full((batch, heads, rows), float("nan"), device="cuda")
    if options.get("bias") is not None:
        options["bias"] = options["bias"].expand(batch, heads, rows, k.shape[2])
    options.setdefault("scale", q.shape[3] ** -0.5)
    library = native.load_library()
    call = native.pack(q, k, v, out, counts=counts, lse=lse, **options)
    workspace = torch.full((library.workspace_size(call),), 255, dtype=torch.uint8, device="cuda")
    library.launch(call.with_workspace(workspace), torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return out, counts, lse


def define(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, TileDecisions, float]:
    """The definition's output, its decisions, and the error of the same mathematics with P in the dtype."""
    options.setdefault("threshold", 0.0)
    options.pop("lse", None)
    expected, tiles = attention(q, k, v, **options)
    rounded = expected.to(q.dtype).float()
    # P rounded to the dtype: relative error of a sum of positive weights times V, bounded by eps/2 of sum |p||v|
    magnitude, _ = attention(q, k, v.abs().nan_to_num(0.0, 0.0, 0.0), **options)
    eps = torch.finfo(q.dtype).eps
    bound = float(((rounded - expected).abs() + eps / 2 * magnitude).max())
    return expected, tiles, bound


def check(q: Tensor, k: Tensor, v: Tensor, *, must_skip: bool = False, **options: Any) -> Tensor:
    lam = options.pop("threshold", 0.0)
    expected, tiles, bound = define(q, k, v, threshold=lam, **options)
    out, counts, _ = run(q, k, v, threshold=lam, **options)
    assert torch.isfinite(out).all()
    if must_skip:
        assert counts[:, 0].sum() > 0
    # a tile within the band may be decided either way, and then the outputs are those of other tiles
    undecided = int(((tiles.gap - math.log(lam)).abs() <= BAND)[tiles.exists].sum()) if lam > 0 else 0
    assert undecided <= tiles.exists.sum() // 1000, "an input on the threshold tests rounding, not the kernel"
    assert (counts - tiles.counts).abs().sum() <= undecided
    if counts.tolist() == tiles.counts.tolist():
        assert (out.float() - expected).abs().max() <= 2 * bound + 1e-5
    return out
