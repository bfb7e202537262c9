"""Inputs for a check: English text where there is a tokenizer, random tokens where there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from export.adapter import Signature
from sparse_attention.errors import UsageError


def builtin_text() -> str:
    """About 700 KB of English prose that every Python installation carries: the topics of its `help()`."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def token_ids(tokenizer: Any | None, tokens: int, vocabulary: int) -> Tensor:
    """`[1, tokens] int64`: the first tokens of the built-in text, or random ones below `vocabulary`."""
    if tokenizer is None:
        return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    text = builtin_text()[: 16 * tokens]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]
    return ids[:, :tokens]


def sample_inputs(signature: Signature, tokenizer: Any | None, tokens: int) -> dict[str, Tensor]:
    """Inputs of the graph that `signature` describes, `tokens` long where it takes tokens.

    Raises:
        UsageError: where the model has fewer positions than `tokens`.
    """
    if "input_ids" not in signature.examples:
        return dict(signature.examples)
    config: Any = signature.module.model.config
    positions = getattr(config, "max_position_embeddings", None) or tokens
    if tokens > positions:
        raise UsageError("the input is longer than the model's positions", found=f"{tokens} tokens",
                         fix=f"pass --tokens {positions} or less")  # fmt: skip
    return signature.sample(token_ids(tokenizer, tokens, config.vocab_size))
