"""From a configuration to the settings of every attention found in a graph."""

from __future__ import annotations

import onnx_ir as ir

from export.rewrite.attention import find_attention
from export.rewrite.report import Settings
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.errors import ModelError
from sparse_attention.patterns import AttentionModule, resolve


def settings_for(model: ir.Model, config: SparseAttentionConfig) -> Settings:
    """Apply a configuration's patterns to the attentions of a graph, by module name and class, or by node name.

    A graph from `torch.onnx.export(dynamo=True)` names the PyTorch module of each attention and its class; any other
    file is matched by the names of its Softmax and Attention nodes.

    Raises:
        ModelError: where the graph holds no attention.
        ConfigError: where a pattern matches none of them.
    """
    sites = find_attention(model)
    if not sites:
        raise ModelError(
            "the graph holds no attention",
            where=model.graph.name or "",
            found="no Softmax that feeds a product, and no Attention operator",
            fix="pass a transformer; attention of other domains (com.microsoft) is not read",
        )
    modules = {site.module: AttentionModule(site.module, site.class_name) for site in sites}
    resolved = resolve(config, list(modules.values()))
    return lambda site: resolved.get(site.module)
