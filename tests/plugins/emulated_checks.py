"""Calls of the emulated kernels, compared with the definition."""

from __future__ import annotations

from typing import Any

import torch
from emulation import Emulation
from planted import planted

from sparse_attention.reference import attention

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Absolute, for outputs of magnitude up to 4; the largest error seen was 8e-3 and 1e-3."""


def inputs(*sizes: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return planted(*sizes, device="cpu", **options)


def check(emulation: Emulation, q: Any, k: Any, v: Any, *, clean: Any = None, seed: int = 0, **options: Any) -> Any:
    """Runs the call and compares output and counts with the definition; returns (output, counts, lse)."""
    out, counts, lse = emulation.run(q, k, v, seed=seed, **options)
    calibrated = options.pop("threshold_factor", 0.0)
    if calibrated:
        options["threshold"] = {"prefill": {"a": calibrated, "b": 1.0, "target": 0.0}}
    expected, tiles = attention(*(clean or (q, k, v)), **options)
    assert counts.tolist() == tiles.counts.tolist()
    assert torch.isfinite(out).all()
    assert (out.float() - expected).abs().max() <= TOLERANCE[q.dtype]
    return out, counts, lse
