"""A graph's signature for each kind of model: decoders with and without a cache, encoders, anything with examples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from export.adapter import BATCH, SEQUENCE, Adapter, Dynamic, Padding, Signature, is_decoder, positions, right_padded
from export.cache import cached_signature
from sparse_attention.errors import ModelError, UsageError
from sparse_attention.huggingface import Visibility, given_lengths


def signature_from(
    described: Mapping[str, Any],
    model: nn.Module,
    examples: Mapping[str, Tensor] | None = None,
    dynamic: Mapping[str, Dynamic] | None = None,
) -> Signature:
    """The signature that `ExportOptions.described` tells of, as a file carries it in its metadata."""
    padding, static = described.get("padding", "auto"), described.get("static_cache", 0)
    if described.get("kv_cache") or static:
        return cached_signature(model, padding=padding, static=static)
    return signature_of(model, padding=padding, examples=examples, dynamic=dynamic)


def signature_of(
    model: nn.Module,
    *,
    padding: Padding = "auto",
    examples: Mapping[str, Tensor] | None = None,
    dynamic: Mapping[str, Dynamic] | None = None,
) -> Signature:
    """The signature of a graph without a KV cache.

    Args:
        model: a Hugging Face model, or any module together with `examples`.
        padding: "auto" is "none" for decoders and "any" for everything else that takes an `attention_mask`.
        examples: example inputs by name; needed for models that are not of Hugging Face.
        dynamic: dynamic dimensions of `examples`: input name -> axis -> dimension name.

    Raises:
        ModelError: where the model's inputs cannot be worked out.
        UsageError: where `padding` does not fit the model.
    """
    if examples is not None:
        return _from_examples(model, dict(examples), dict(dynamic or {}))
    if not hasattr(model, "config"):
        raise ModelError(
            "example inputs are needed for a model that is not of Hugging Face", where=type(model).__name__,
            fix="let the callable return (model, {'input name': example tensor}, {'input name': {axis: 'dimension'}})",
        )  # fmt: skip
    if is_decoder(model):
        return _decoder(model, "none" if padding == "auto" else padding)
    if padding == "right":
        raise UsageError("padding 'right' is for decoders", where=type(model).__name__, fix="use --padding any or none")
    return _encoder(model, "any" if padding == "auto" else padding)


def _decoder(model: nn.Module, padding: Padding) -> Signature:
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def call(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Sequence[Tensor]:
        options: dict[str, Any] = {"use_cache": False}
        if takes_positions:
            options["position_ids"] = positions(input_ids, attention_mask if padding == "any" else None)
        if padding == "any":
            return [model(input_ids, attention_mask=attention_mask, **options).logits]
        lengths = Visibility() if attention_mask is None else right_padded(attention_mask)
        with given_lengths(lengths):  # the mask only keeps transformers from looking for packed sequences
            return [model(input_ids, attention_mask=torch.ones_like(input_ids), **options).logits]

    config: Any = model.config
    examples = {"input_ids": torch.randint(0, config.vocab_size, (BATCH, SEQUENCE))}
    if padding != "none":
        examples["attention_mask"] = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
    dynamic = {name: {0: "batch", 1: "sequence"} for name in examples}
    return Signature(Adapter(model, call), examples, dynamic, ("logits",))


def _encoder(model: nn.Module, padding: Padding) -> Signature:
    parameters = inspect.signature(model.forward).parameters
    config: Any = model.config
    examples: dict[str, Tensor] = {}
    dynamic: dict[str, Dynamic] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        dtype = next(model.parameters()).dtype
        examples[main] = torch.rand(BATCH, getattr(config, "num_channels", 3), height, width, dtype=dtype)
        dynamic[main] = {0: "batch"}
    elif main == "input_ids" and "decoder_input_ids" not in parameters:
        examples[main] = torch.randint(0, config.vocab_size, (BATCH, SEQUENCE))
        if padding != "none" and "attention_mask" in parameters:
            examples["attention_mask"] = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
        if "token_type_ids" in parameters and getattr(config, "type_vocab_size", 0) > 1:
            examples["token_type_ids"] = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        dynamic |= {name: {0: "batch", 1: "sequence"} for name in examples}
    else:
        raise ModelError(
            "the inputs of this kind of model are not known", where=type(model).__name__, found=main,
            fix="pass module:callable, where the callable returns (model, example inputs, dynamic dimensions)",
        )  # fmt: skip
    return _from_examples(model, examples, dynamic)


def _from_examples(model: nn.Module, examples: dict[str, Tensor], dynamic: dict[str, Dynamic]) -> Signature:
    """Outputs are named after the model's own output fields; a plain tensor is `output`."""
    with torch.no_grad():
        names = tuple(_tensors(model(**examples)))
    if not names:
        raise ModelError("the model returns no tensor", where=type(model).__name__, fix="wrap it so that it does")
    order = tuple(examples)

    def call(model: nn.Module, *inputs: Tensor) -> Sequence[Tensor]:
        return list(_tensors(model(**dict(zip(order, inputs, strict=True)))).values())

    return Signature(Adapter(model, call), examples, dynamic, names)


def _tensors(output: Any) -> dict[str, Tensor]:
    """The tensors a model returned, by name; caches and hidden extras are left out."""
    if isinstance(output, Tensor):
        return {"output": output}
    named = output.items() if isinstance(output, Mapping) else ((f"output_{i}", x) for i, x in enumerate(output))
    return {str(name): value for name, value in named if isinstance(value, Tensor)}
