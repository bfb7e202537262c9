"""How fast attention is on this machine's CPU, in PyTorch: the op, its dense path, SDPA, softmax patching.

Inputs are planted, so that the share of skipped tiles is chosen; it is counted, not assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from sparse_attention import AttentionLayer, Thresholds, block_skip_attention
from sparse_attention.patterns import ResolvedAttention
from sparse_attention.softmax import SoftmaxPatch
from sparse_attention.statistics import total_sparsity


@dataclass(frozen=True)
class Timing:
    """Median seconds of one forward, and the share of the tiles that it skipped."""

    seconds: float
    sparsity: float = 0.0


def planted(length: int, keep: float, *, heads: int = 9, kv_heads: int = 3, size: int = 64) -> tuple[Tensor, ...]:
    """q, k, v `[1, H, length, size]` float32; a share `keep` of the key tiles (128 wide) scores high, the first too."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, length, size, generator=generator) for n in (heads, kv_heads, kv_heads))
    high = torch.rand(kv_heads, -(-length // 128), generator=generator) < keep
    high[:, 0] = True
    q[..., 0] = 8.0
    k[..., 0] = torch.where(high, 8.0, -8.0).repeat_interleave(128, 1)[None, :, :length]
    return q, k, v


def measure_op(length: int = 2048, rounds: int = 15) -> dict[str, Timing]:
    """SDPA, the op at λ = 0, with nothing skipped, and with half (51 %) of the tiles skipped; all take turns."""
    q, k, v = planted(length, 1.0)
    half = planted(length, 0.55)

    def op(qkv: tuple[Tensor, ...], threshold: float) -> Callable[[], Tensor]:
        return lambda: block_skip_attention(*qkv, threshold=threshold, is_causal=True)

    runs: dict[str, Callable[[], object]] = {
        "sdpa": lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "op, λ = 0": op((q, k, v), 0.0),
        "op, nothing skipped": op((q, k, v), 1e-30),
        "op, half skipped": op(half, 1e-3),
    }
    times = take_turns(runs, rounds)
    sparsity = {"op, nothing skipped": ((q, k, v), 1e-30), "op, half skipped": (half, 1e-3)}
    return {
        name: Timing(seconds, _sparsity(*sparsity[name]) if name in sparsity else 0.0)
        for name, seconds in times.items()
    }


def measure_softmax_patching(length: int = 2048, rounds: int = 5) -> dict[str, Timing]:
    """Attention of one Llama layer: "eager" (transformers' own), the same with its softmax patched, and the op."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, eager_attention_forward

    q, k, v = planted(length, 0.37)
    config = LlamaConfig(hidden_size=9 * 64, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    module = LlamaAttention(config, layer_idx=0).eval()
    hidden = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    thresholds = Thresholds.of(1e-3)
    layer = AttentionLayer("attention", "LlamaAttention", ResolvedAttention(True, thresholds))

    def eager() -> object:
        return eager_attention_forward(module, q, k, v, hidden, scaling=q.shape[-1] ** -0.5)

    def patched() -> object:
        with SoftmaxPatch(layer):
            return eager()

    runs = {"eager": eager, "eager, softmax patched": patched,
            "op": lambda: block_skip_attention(q, k, v, threshold=thresholds, is_causal=True)}  # fmt: skip
    with torch.no_grad():
        times = take_turns(runs, rounds)
    skipped = total_sparsity(layer.statistics.by_phase.values())
    return {name: Timing(seconds, 0.0 if name == "eager" else skipped) for name, seconds in times.items()}


def _sparsity(qkv: tuple[Tensor, ...], threshold: float) -> float:
    q, k, v = qkv
    return block_skip_attention(q, k, v, threshold=threshold, is_causal=True, return_stats=True)[1].sparsity


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each run; they take turns, so that a machine that slows down slows all of them."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: median(found) for name, found in times.items()}
