"""`sparsify(model, config)`: every attention that the configuration names runs block-skip attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from torch import nn

from sparse_attention import functional, huggingface, softmax
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.config_io import Source, load_config
from sparse_attention.errors import ConfigError, ModelError, UsageError
from sparse_attention.layer import AttentionLayer, attach, detach, layer_of, layers_of
from sparse_attention.patterns import AttentionModule, ResolvedAttention, resolve
from sparse_attention.statistics import TileCounts, total_sparsity
from sparse_attention.threshold import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Path = Literal["op", "softmax"]

_BEFORE = "_block_skip_before"


def attention_modules(model: nn.Module, *, path: Path = "op") -> list[AttentionModule]:
    """The modules of `model` that compute attention: what a pattern can match.

    Those are modules that ask the attention registry of `transformers`, `nn.MultiheadAttention` (also inside
    `nn.TransformerEncoderLayer`), and modules whose own code calls `scaled_dot_product_attention`; on the softmax path
    also those that are called attention and whose own code calls a softmax.
    """
    kinds = [huggingface.computes_attention, functional.computes_attention]
    if path == "softmax":
        kinds.append(softmax.computes_attention)
    return [
        AttentionModule(name, type(module).__name__)
        for name, module in model.named_modules()
        if any(computes_attention(module) for computes_attention in kinds)
    ]


def sparsify(
    model: nn.Module,
    config: SparseAttentionConfig | Source,
    *,
    unit: str = "head",
    path: Path = "op",
) -> nn.Module:
    """Makes the attention of `model` block-skip attention, in place, and returns the model.

    Args:
        model: a model in eval mode: from Hugging Face with any attention implementation, or of plain PyTorch modules.
        config: which modules, and how; a configuration, a preset's name, a dict or a file.
        unit: "head" decides per query head, "group" jointly over the heads that share a K/V head.
        path: "op" runs `block_skip_attention` and can be exported; "softmax" leaves the model's own code in place and
            patches the softmax inside it, which needs `attn_implementation="eager"` and decides per head.

    Raises:
        ConfigError: where the configuration does not fit the model: a pattern matches nothing, or `is_causal` was set
            and contradicts the model.
        ModelError: where the model has no attention that can be sparsified this way, or is sparsified already.
        UsageError: where `path` is unknown, or does not know `unit`.
    """
    if layers_of(model):
        raise ModelError("the model is sparsified already", where=type(model).__name__, fix="call restore(model) first")
    if path not in ("op", "softmax") or (path == "softmax" and unit != "head"):
        raise UsageError(
            "unknown path into attention" if unit == "head" else "the softmax path decides per head",
            where="sparsify",
            found=f"path={path!r}, unit={unit!r}",
            fix='use path="op", or path="softmax" with unit="head"',
        )
    settings = resolve(load_config(config), attention_modules(model, path=path))
    modules = dict(model.named_modules())
    for name, resolved in settings.items():
        _check_causality(name, modules[name], resolved)
    registry = [name for name in settings if huggingface.computes_attention(modules[name])]
    # The registry serves all of its modules or none; any other module that stays dense is left as it is.
    others = [name for name in settings if name not in registry and settings[name].enable]
    if path == "softmax":
        registry = [name for name in registry if settings[name].enable]
        for name in (*registry, *others):
            softmax.require_eager(modules[name], name)
    elif registry and not hasattr(model, "set_attn_implementation"):
        raise ModelError(
            "the model has no attention registry",
            where=type(model).__name__,
            fix="pass the transformers model itself, not a wrapper around it",
        )
    try:
        for name in (*registry, *others):
            module, resolved = modules[name], settings[name]
            attach(module, AttentionLayer(name, type(module).__name__, resolved, enabled=resolved.enable, unit=unit))
            if path == "softmax":
                softmax.install(module)
            elif name in others:
                functional.install(module)
        if path == "op":
            functional.keep_padding(model)
            if registry:
                setattr(model, _BEFORE, huggingface.install(cast("PreTrainedModel", model)))
    except BaseException:
        restore(model)
        raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `sparsify`: the model computes attention as it did before."""
    for module in model.modules():
        detach(module)
        functional.uninstall(module)  # whatever replaced its forward
    functional.allow_packing(model)
    if _BEFORE in model.__dict__:
        huggingface.uninstall(cast("PreTrainedModel", model), getattr(model, _BEFORE))
        delattr(model, _BEFORE)
    return model


def disable(model: nn.Module) -> None:
    """Switches every layer to dense (λ = 0), without leaving the op."""
    for layer in _required(model):
        layer.enabled = False


def enable(model: nn.Module) -> None:
    """Switches the layers that the configuration enables back on."""
    for layer in _required(model):
        layer.enabled = layer.settings.enable


@dataclass(frozen=True)
class LayerSummary:
    """One attention module: its settings, and what it has counted since the statistics were reset."""

    name: str
    class_name: str
    enabled: bool
    settings: ResolvedAttention
    counts: dict[Phase, TileCounts]

    @property
    def sparsity(self) -> float:
        """Skipped over existing tiles, all phases together, in [0, 1]."""
        return total_sparsity(self.counts.values())


def summary(model: nn.Module) -> list[LayerSummary]:
    """What every attention module of a sparsified model is set to and has counted."""
    return [
        LayerSummary(layer.name, layer.class_name, layer.enabled, layer.settings, layer.statistics.by_phase)
        for layer in _required(model)
    ]


def reset_statistics(model: nn.Module) -> None:
    """Forgets what the layers have counted."""
    for layer in _required(model):
        layer.statistics.reset()


def _required(model: nn.Module) -> Iterable[AttentionLayer]:
    layers = layers_of(model)
    if not layers:
        raise ModelError("the model is not sparsified", where=type(model).__name__, fix="call sparsify(model, config)")
    return layers


def _check_causality(name: str, module: nn.Module, resolved: ResolvedAttention) -> None:
    own = getattr(module, "is_causal", None)
    if resolved.enable and resolved.is_causal_explicit and isinstance(own, bool) and own != resolved.is_causal:
        raise ConfigError(
            "is_causal contradicts the model",
            where=f"{name} ({type(module).__name__})",
            found=f"is_causal={resolved.is_causal} in the configuration, {own} in the model",
            fix="leave is_causal out of the configuration: the model's own is used",
        )


__all__ = [
    "LayerSummary", "attention_modules", "disable", "enable", "layer_of", "reset_statistics", "restore", "sparsify",
    "summary",
]  # fmt: skip
