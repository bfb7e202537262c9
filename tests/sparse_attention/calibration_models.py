"""Small models whose attention skips tiles: random Llamas with peaky scores."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {"sparse_cfg": {"*attention*": {"br": 8, "bc": 8, "threshold": 0.0}}}


def peaky_llama(
    seed: int = 0, layers: int = 2, heads: int = 4, kv_heads: int = 2, vocab: int = 97, peak: float = 1000.0
) -> LlamaForCausalLM:
    """A Llama with head size 8 whose scores spread over tens, so that tiles of 8 x 8 are skipped."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=8 * heads, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= peak
    return model


def random_texts(count: int, length: int, vocab: int = 97, seed: int = 1) -> list[torch.Tensor]:
    """Token ids `[1, length]` each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (1, length), generator=generator) for _ in range(count)]


def peaky_qkv(
    *, batch: int, heads: int, kv_heads: int, rows: int, columns: int, size: int = 8, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v whose scores lie tens apart."""
    generator = torch.Generator().manual_seed(seed)
    q = 6 * torch.randn(batch, heads, rows, size, generator=generator)
    k = torch.randn(batch, kv_heads, columns, size, generator=generator)
    return q, k, torch.randn(batch, kv_heads, columns, size, generator=generator)
