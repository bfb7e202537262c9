"""Tiny random Hugging Face models with peaky attention, by family, for the tests of sparsification."""

from __future__ import annotations

import torch
import transformers
from torch import nn

VOCABULARY = 64
_SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "pad_token_id": 0}
BIDIRECTIONAL = {
    **_SIZES, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
SMALL = {**BIDIRECTIONAL, "num_key_value_heads": 2, "head_dim": 8}
MIXED = {**SMALL, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SMALL, "sliding_window": 24}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**MIXED, "attn_logit_softcapping": 20.0,
               "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**MIXED, "query_pre_attn_scalar": 8}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4,
             "n_positions": 256}),
    "bert": ("BertModel", "BertConfig", BIDIRECTIONAL),
    "bart": ("BartModel", "BartConfig", {**_SIZES, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}),
    "t5": ("T5Model", "T5Config", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2,
           "num_heads": 4, "pad_token_id": 0, "dropout_rate": 0.0}),
}  # fmt: skip
DECODERS = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt2")
_SPREAD = tuple(f".{name}.weight" for name in ("q_proj", "k_proj", "query", "key", "c_attn"))


def tiny(family: str, *, sharpness: float = 1.0, implementation: str = "eager") -> nn.Module:
    """A random model of the family in eval mode, whose scores spread by about 2 x `sharpness`: that skips tiles."""
    model_class, config_class, settings = FAMILIES[family]
    torch.manual_seed(7)
    config = getattr(transformers, config_class)(**settings, attn_implementation=implementation)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_SPREAD):
                parameter.normal_(0.0, (2.0 * sharpness / 32) ** 0.5)
            if name.endswith("sinks"):
                parameter.normal_()
    return model.requires_grad_(False)


def settings(threshold: float | dict[str, float] = 0.7, tile: int = 4) -> dict[str, object]:
    """A configuration that makes every attention sparse, in small square tiles."""
    return {"sparse_cfg": {"*att*": {"threshold": threshold, "br": tile, "bc": tile}}}
