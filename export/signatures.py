"""What a graph's inputs and outputs are: an adapter per kind of model, example inputs, named dynamic dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_attention.errors import ModelError, UsageError
from sparse_attention.huggingface import Visibility, given_lengths

Padding = Literal["auto", "none", "right", "any"]
"""What the graph's `attention_mask` may hide: nothing (no such input), the right end, or anything."""

Dynamic = dict[int, str]

ADAPTED = "adapted"
"""Name of the model inside its adapter: the first part of every module scope in a traced graph."""

_BATCH, _SEQUENCE = 2, 24  # of the example inputs; no dimension of a model is likely to be 24 by accident


class Adapter(nn.Module):
    """Calls a model with positional tensors, as a graph does, and returns a tuple of tensors."""

    def __init__(self, model: nn.Module, call: Callable[..., Sequence[Tensor]]) -> None:
        super().__init__()
        self.add_module(ADAPTED, model)
        self._call = call

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self.get_submodule(ADAPTED)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._call(self.model, *inputs))


@dataclass(frozen=True)
class Signature:
    """A module that takes the graph's inputs in order, example inputs, dynamic dimensions by name, output names."""

    module: Adapter
    examples: dict[str, Tensor]
    dynamic: dict[str, Dynamic]
    outputs: tuple[str, ...]

    def sample(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Inputs of the graph for the tokens `[B, S]`, none of them padded."""
        ones = torch.ones_like(input_ids)
        known = {"input_ids": input_ids, "attention_mask": ones, "token_type_ids": torch.zeros_like(input_ids)}
        return {name: known.get(name, example) for name, example in self.examples.items()}

    def following(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Inputs of the call that comes after one with these inputs and outputs; None where calls do not follow."""
        return None

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The graph's outputs by name, computed by PyTorch."""
        values = self.module(*(inputs[name] for name in self.examples))
        return dict(zip(self.outputs, values, strict=True))


def is_decoder(model: nn.Module) -> bool:
    """Whether the model generates text token by token."""
    can_generate = getattr(model, "can_generate", None)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(can_generate is not None and can_generate() and not encoder_decoder)


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


def right_padded(mask: Tensor) -> Visibility:
    """The lengths that a right padded mask `[B, S]` (1 = valid) describes, for self-attention without a past."""
    lengths = mask.sum(-1).to(torch.int32)
    return Visibility(kv_lengths=lengths, q_lengths=lengths)


def positions(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Position of every token, `[B, S]`: counted over the valid tokens, as `generate` of transformers does.

    Written out for every batch element: the exporter's fused RotaryEmbedding does not broadcast over the batch.
    """
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0).expand(input_ids.shape[0], -1)
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


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

    examples = {"input_ids": torch.randint(0, model.config.vocab_size, (_BATCH, _SEQUENCE))}
    if padding != "none":
        examples["attention_mask"] = torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64)
    dynamic = {name: {0: "batch", 1: "sequence"} for name in examples}
    return Signature(Adapter(model, call), examples, dynamic, ("logits",))


def _encoder(model: nn.Module, padding: Padding) -> Signature:
    parameters = inspect.signature(model.forward).parameters
    config = model.config
    examples: dict[str, Tensor] = {}
    dynamic: dict[str, Dynamic] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        dtype = next(model.parameters()).dtype
        examples[main] = torch.rand(_BATCH, getattr(config, "num_channels", 3), height, width, dtype=dtype)
        dynamic[main] = {0: "batch"}
    elif main == "input_ids" and "decoder_input_ids" not in parameters:
        examples[main] = torch.randint(0, config.vocab_size, (_BATCH, _SEQUENCE))
        if padding != "none" and "attention_mask" in parameters:
            examples["attention_mask"] = torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64)
        if "token_type_ids" in parameters and getattr(config, "type_vocab_size", 0) > 1:
            examples["token_type_ids"] = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
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
