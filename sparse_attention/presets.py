"""Configurations by name."""

from __future__ import annotations

from typing import Any

from sparse_attention.config import FlashSkipSoftmaxConfig, SparseAttentionConfig


def _every_attention(**settings: Any) -> SparseAttentionConfig:
    tile = {"method": "flash_skip_softmax", "br": 128, "bc": 128, "backend": "pytorch", "enable": True}
    return SparseAttentionConfig(sparse_cfg={"*attention*": {**tile, **settings}, "default": {"enable": False}})


# Names are looked up without regard to case, so that ModelOpt's SKIP_SOFTMAX_DEFAULT and SKIP_SOFTMAX_CALIB are found.
PRESETS: dict[str, SparseAttentionConfig] = {
    # λ = 0.001 in prefill, 0.0001 in decode, as in ModelOpt: very careful, skips little below 8k tokens.
    "skip_softmax_default": FlashSkipSoftmaxConfig(),
    # A request for half of the tiles in either phase, with ModelOpt's amount of text; calibrate before exporting.
    "skip_softmax_calib": _every_attention(
        calibration={"prefill": {"target": 0.5}, "decode": {"target": 0.5}, "samples": 64, "max_seqlen": 16384}
    ),
    # Skips a quarter of SmolLM2-135M's tiles at 2048 tokens, where perplexity goes from 11.883 to 11.886.
    "skip_softmax_demo": _every_attention(threshold=0.1),
    # The op in place and nothing skipped: what sparse runs are compared with.
    "dense": _every_attention(threshold=0.0),
}
