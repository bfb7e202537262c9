"""What a graph's inputs and outputs are, and the module that takes and returns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_attention.huggingface import Visibility

Padding = Literal["auto", "none", "right", "any"]
"""What the graph's `attention_mask` may hide: nothing (no such input), the right end, or anything."""

Dynamic = dict[int, str]

ADAPTED = "adapted"
"""Name of the model inside its adapter: the first part of every module scope in a traced graph."""

BATCH, SEQUENCE = 2, 24
"""Of example inputs; no dimension of a model is likely to be 24 by accident."""


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


def right_padded(mask: Tensor, rows: int | None = None) -> Visibility:
    """The lengths that a right padded mask `[B, Sk]` (1 = valid) describes; the queries are its last `rows` columns."""
    lengths = mask.sum(-1)
    start = 0 if rows is None else mask.shape[-1] - rows
    return Visibility(kv_lengths=lengths.to(torch.int32), q_lengths=(lengths - start).clamp(min=0).to(torch.int32))


def positions(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Position of every token, `[B, S]`: counted over the valid tokens, as `generate` of transformers does.

    Written out for every batch element: the exporter's fused RotaryEmbedding does not broadcast over the batch.
    """
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0).expand(input_ids.shape[0], -1)
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
