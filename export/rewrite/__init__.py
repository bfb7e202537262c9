"""Attention subgraphs of any ONNX model become the op: one file per idea, pattern, check and rewrite kept apart."""

from export.rewrite.attention import find_attention, rewrite_attention
from export.rewrite.report import AttentionSite, Left, RewriteReport, Rewritten, Settings

__all__ = [
    "AttentionSite",
    "Left",
    "RewriteReport",
    "Rewritten",
    "Settings",
    "find_attention",
    "rewrite_attention",
]
