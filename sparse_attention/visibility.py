"""Which query sees which key, as the op takes it: causality, window, lengths, and a mask for whatever else there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_attention.errors import ModelError


@dataclass(frozen=True)
class Visibility:
    """Which pairs see each other; travels through a Hugging Face model in the place of a mask.

    `bias` is boolean (True = attend) or additive, broadcastable to `[B, Hq, Sq, Sk]`; lengths and starts are
    `[B] int32`; None means the op's default.
    """

    is_causal: bool = False
    window: int = 0
    bias: Tensor | None = None
    kv_lengths: Tensor | None = None
    q_start: Tensor | None = None
    q_lengths: Tensor | None = None
    rows_of_encoder_only: bool = False  # q_lengths may belong to the keys of a cross-attention

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModelError(
            "the model's own code works on its attention mask, which the op replaces by lengths and flags",
            where=f"attention_mask.{name}",
            fix='use sparsify(model, config, path="softmax"), or export the dense model and rewrite its attention',
        )

    def to(self, device: torch.device | str | int, **others: bool) -> Visibility:
        """The same on another device: `accelerate` moves what a module is given to where the module is."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def __getitem__(self, key: object) -> object:
        return self.__getattr__("slice")


def with_padding(
    seen: Visibility, padding: Tensor, q_length: int, start: int | Tensor, *, rows_too: bool
) -> Visibility:
    """Adds what the padding mask `[B, Sk] bool` (False = padding) hides: lengths for the right end, a mask for holes.

    `start` is the position of the first query row. `rows_too` says that queries and keys are the same tokens, so that
    padded rows are known and have no vote.
    """
    tracing = torch.compiler.is_compiling()
    if not tracing and bool(padding.all()):
        return seen
    position = torch.arange(1, padding.shape[-1] + 1, device=padding.device)
    lengths = (position * padding).amax(-1)
    bias = seen.bias
    if tracing or not bool(((position <= lengths[:, None]) == padding).all()):
        bias = merged(bias, padding[:, None, None, :])
    q_lengths = (lengths - start).clamp(min=0).clamp(max=q_length).to(torch.int32) if rows_too else None
    kv_lengths = lengths.to(torch.int32)
    if seen.kv_lengths is not None:
        kv_lengths = torch.minimum(kv_lengths, seen.kv_lengths)
    return replace(seen, bias=bias, kv_lengths=kv_lengths, q_lengths=q_lengths)


def merged(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """One mask that says what both say; each is boolean (True = attend), additive, or None."""
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        first, second = second, first
    if second.dtype == torch.bool:
        return torch.where(second, first, torch.finfo(first.dtype).min)
    return first + second
