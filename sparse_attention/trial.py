"""Trying a configuration on a model for a while: the model is given back as it came."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_attention.config import SparseAttentionConfig
from sparse_attention.errors import ModelError, UsageError
from sparse_attention.layer import AttentionLayer, layers_of
from sparse_attention.patterns import resolve
from sparse_attention.sparsify import attention_modules, restore, sparsify
from sparse_attention.statistics import LayerStatistics

Batch = Tensor | Mapping[str, Any]
"""Token ids `[B, S]`, or the keyword arguments of a model's forward."""


@contextmanager
def trial(
    model: nn.Module, config: SparseAttentionConfig, *, unit: str | None = None
) -> Iterator[list[AttentionLayer]]:
    """The layers of `model` under `config`, with fresh statistics, inside the block.

    A model that is sparsified already keeps its layers; their settings, switches and counts come back afterwards.
    `unit` is "head" or "group" where it is not to stay what it was.
    """
    given = bool(layers_of(model))
    if not given:
        sparsify(model, config)
    settings = resolve(config, attention_modules(model))
    layers = layers_of(model)
    before = [(layer.settings, layer.enabled, layer.unit, layer.statistics) for layer in layers]
    for layer in layers:
        layer.settings, layer.enabled = settings[layer.name], settings[layer.name].enable
        layer.statistics, layer.unit = LayerStatistics(), unit or layer.unit
    try:
        yield layers
    finally:
        for layer, kept in zip(layers, before, strict=True):
            layer.settings, layer.enabled, layer.unit, layer.statistics = kept
        if not given:
            restore(model)


def forward(model: nn.Module, batch: Batch, **keywords: Any) -> Any:
    """Runs the model on a batch on its own device, without gradients; keywords it does not know are left out.

    Raises:
        ModelError: where a token id is beyond the model's vocabulary: another model's tokenizer.
    """
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    _check_vocabulary(model, inputs.get("input_ids"))
    device = getattr(model, "device", None) or next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    known = inspect.signature(model.forward).parameters
    keywords = {name: value for name, value in keywords.items() if name in known}
    with torch.inference_mode():
        return model(**inputs, **keywords)


def tokens_of(batch: Batch) -> int:
    """How many tokens the texts of a batch have.

    Raises:
        UsageError: where it holds no token ids `[B, S]`.
    """
    tensors = [batch] if isinstance(batch, Tensor) else [v for v in batch.values() if isinstance(v, Tensor)]
    if not tensors or tensors[0].dim() != 2:
        raise UsageError(
            "a batch holds no texts",
            where="batches",
            found=str([list(tensor.shape) for tensor in tensors]),
            fix="pass token ids [B, S], or the keyword arguments of the model's forward",
        )
    return int(tensors[0].shape[1])


def shortened(batch: Batch, length: int) -> Batch:
    """The first `length` tokens of a batch's texts."""
    if isinstance(batch, Tensor):
        return batch[:, :length]
    size = tokens_of(batch)
    return {
        name: value[:, :length] if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == size else value
        for name, value in batch.items()
    }


def _check_vocabulary(model: nn.Module, ids: Any) -> None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(ids, Tensor) or not isinstance(size, int) or not ids.numel():
        return
    highest = int(ids.max())
    if highest >= size or int(ids.min()) < 0:
        raise ModelError(
            "a token id is not in the model's vocabulary",
            where=type(model).__name__,
            found=f"token id {highest if highest >= size else int(ids.min())}, vocabulary of {size}",
            fix="use the tokenizer that belongs to the model",
        )
