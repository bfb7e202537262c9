"""Block-skip softmax attention in PyTorch: configuration, the op and its definition, sparsification, calibration."""

from sparse_attention.attention import block_skip_attention
from sparse_attention.calibrate import Calibration, calibrate
from sparse_attention.checkpoint import load_checkpoint, save_checkpoint
from sparse_attention.config import (
    FlashSkipSoftmaxConfig,
    SparseAttentionAttributeConfig,
    SparseAttentionConfig,
)
from sparse_attention.config_io import json_schema, load_config, save_config
from sparse_attention.errors import SparseAttentionError
from sparse_attention.layer import AttentionCall, AttentionLayer, layers_of, observed
from sparse_attention.quality import Quality, quality
from sparse_attention.reference import keep_tiles
from sparse_attention.sparsify import (
    LayerSummary,
    attention_modules,
    disable,
    enable,
    reset_statistics,
    restore,
    sparsify,
    summary,
)
from sparse_attention.statistics import TileCounts
from sparse_attention.threshold import PhaseThreshold, Thresholds

__all__ = [
    "AttentionCall",
    "AttentionLayer",
    "Calibration",
    "FlashSkipSoftmaxConfig",
    "LayerSummary",
    "PhaseThreshold",
    "Quality",
    "SparseAttentionAttributeConfig",
    "SparseAttentionConfig",
    "SparseAttentionError",
    "Thresholds",
    "TileCounts",
    "attention_modules",
    "block_skip_attention",
    "calibrate",
    "disable",
    "enable",
    "json_schema",
    "keep_tiles",
    "layers_of",
    "load_checkpoint",
    "load_config",
    "observed",
    "quality",
    "reset_statistics",
    "restore",
    "save_checkpoint",
    "save_config",
    "sparsify",
    "summary",
]
