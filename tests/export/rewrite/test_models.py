"""Real exports: each model through the attention registry and through rewriting gives the same numbers.

The projections of q and k are scaled up so that scores are peaky and tiles are skipped in every model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import pytest
import torch
from rewrite_helpers import op_nodes
from torch import Tensor, nn

from export.finish import finish
from export.rewrite import RewriteReport, rewrite_attention
from export.runners import session
from export.signatures import signature_of
from export.trace import trace
from sparse_attention.attention import block_skip_attention
from sparse_attention.patterns import ResolvedAttention
from sparse_attention.sparsify import sparsify
from sparse_attention.statistics import TileCounts
from sparse_attention.threshold import Thresholds

transformers = pytest.importorskip("transformers")

THRESHOLD, TILE, ROWS = 0.2, 8, 45
RESOLVED = ResolvedAttention(True, Thresholds.of(THRESHOLD), br=TILE, bc=TILE)
CONFIG = {"sparse_cfg": {"*": {"threshold": THRESHOLD, "br": TILE, "bc": TILE}}}
SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


def make(name: str, implementation: str) -> nn.Module:
    """A tiny model with random, peaky weights; the same for every implementation."""
    torch.manual_seed(0)
    shared = {"max_position_embeddings": 128, "intermediate_size": 48, "attn_implementation": implementation}
    if name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **shared, num_key_value_heads=2))
    elif name == "bert":
        model = transformers.BertModel(transformers.BertConfig(**SIZES, **shared))
    else:
        special = {"bos_token_id": 0, "eos_token_id": 0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **shared, **special))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("q_proj.w", "k_proj.w", "query.w", "key.w")):
                parameter.mul_(25.0)
            elif parameter_name.endswith("c_attn.weight"):
                parameter[:, : 2 * SIZES["hidden_size"]] *= 25.0
    return model.eval()


def ids(rows: int = ROWS) -> Tensor:
    return torch.randint(0, 64, (2, rows), generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """The model as a function of tensors, as any user would export it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.adapted = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.adapted(input_ids, attention_mask=attention_mask)[0]


@contextmanager
def quiet() -> Iterator[None]:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def exported(module: nn.Module, *inputs: Tensor, opset: int) -> ir.Model:
    """A plain export with dynamic batch and sequence, nothing of this project in it."""
    dynamic = tuple({0: "batch", 1: "sequence"} for _ in inputs)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module, inputs, dynamo=True, opset_version=opset, dynamic_shapes=dynamic, verbose=False
        )
    return program.model


def through_rewriting(model: ir.Model) -> RewriteReport:
    sites = []
    report = rewrite_attention(model, lambda site: sites.append(site) or RESOLVED)
    assert not report.left, str(report)
    finish(model)
    return report


def run(model: ir.Model, *inputs: Tensor) -> np.ndarray:
    names = [value.name for value in model.graph.inputs]
    feeds = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    return session(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]


@pytest.fixture(scope="module", params=["llama", "bert", "gpt2"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def registry(name: str) -> tuple[nn.Module, ir.Model]:
    """The sparsified PyTorch model, and its export through the registry."""
    model = sparsify(make(name, "sdpa"), CONFIG)
    return model, finish(trace(signature_of(model, padding="none")))


@pytest.fixture(scope="module")
def eager(name: str) -> tuple[ir.Model, RewriteReport]:
    """A plain eager export at opset 18, rewritten: no `Attention` operator exists there."""
    inputs = (ids(), torch.ones_like(ids())) if name == "bert" else (ids(),)
    model = exported(Plain(make(name, "eager")), *inputs, opset=18)
    return model, through_rewriting(model)


def test_registry_and_rewriting_agree(
    name: str, registry: tuple[nn.Module, ir.Model], eager: tuple[ir.Model, RewriteReport]
) -> None:
    sparse, traced = registry
    tokens = ids()
    with torch.no_grad():
        expected = sparse(tokens)[0].numpy()
        dense = make(name, "eager")(tokens)[0].numpy()
    assert np.abs(expected - dense).max() > 1e-3, "nothing was skipped"
    inputs = (tokens, torch.ones_like(tokens)) if name == "bert" else (tokens,)
    found = run(eager[0], *inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    values = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    through_registry = run(traced, *(values[value.name] for value in traced.graph.inputs))
    np.testing.assert_allclose(found, through_registry, atol=1e-5)


def test_what_the_nodes_say(name: str, eager: tuple[ir.Model, RewriteReport]) -> None:
    model, report = eager
    modules = {
        "llama": "model.layers.{}.self_attn",
        "bert": "encoder.layer.{}.attention.self",
        "gpt2": "transformer.h.{}.attn",
    }
    assert [entry.site.module for entry in report.rewritten] == [modules[name].format(layer) for layer in (0, 1)]
    classes = {"llama": "LlamaAttention", "bert": "BertSelfAttention", "gpt2": "GPT2Attention"}
    assert {entry.site.class_name for entry in report.rewritten} == {classes[name]}
    for node, entry in zip(op_nodes(model), report.rewritten, strict=True):
        assert entry.is_causal == (name != "bert")
        assert entry.kv_groups == (2 if name == "llama" else 1)
        assert node.attributes["inputs"].value == ("q,k,v,bias" if name == "bert" else "q,k,v")
        assert "self_attn" in node.metadata_props["pkg.torch.onnx.name_scopes"] or name != "llama"
    assert not [node for node in model.graph if node.op_type in ("Softmax", "Trilu", "GatherND") and name != "bert"]


@pytest.fixture(scope="module")
def padded() -> tuple[ir.Model, RewriteReport]:
    """Llama with `scaled_dot_product_attention` and a padding mask, written out by the exporter at opset 18."""
    model = exported(Plain(make("llama", "sdpa")), ids(), torch.ones_like(ids()), opset=18)
    return model, through_rewriting(model)


@pytest.mark.parametrize("lengths", [(ROWS, ROWS), (ROWS, 32)])
def test_padding_stays_a_mask_beside_causality(
    lengths: tuple[int, int], padded: tuple[ir.Model, RewriteReport]
) -> None:
    """The exporter's mask joins causality and padding: one becomes an attribute, the other a [B, 1, 1, Sk] mask.

    A mask of keys says nothing of query rows, so padded rows vote here and not in the registry: lengths that end with
    a tile (32) give the same numbers.
    """
    model, report = padded
    mask = torch.stack([(torch.arange(ROWS) < length).long() for length in lengths])
    assert {(entry.is_causal, entry.inputs[3:], entry.kv_groups) for entry in report.rewritten} == {
        (True, ("bias",), 2)
    }
    bias = op_nodes(model)[0].inputs[3]
    assert bias.dtype == ir.DataType.BOOL and [dim == 1 for dim in bias.shape] == [False, True, True, False]
    sparse = sparsify(make("llama", "sdpa"), CONFIG)
    with torch.no_grad():
        expected = sparse(ids(), attention_mask=mask)[0].numpy()
    found = run(model, ids(), mask)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], atol=1e-5)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with peaky scores; PyTorch's fused fast path is off, as in an export."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        with torch.no_grad():
            for block in self.encoder.layers:
                block.self_attn.in_proj_weight[:64] *= 6.0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


@contextmanager
def sparse_sdpa(counts: list[TileCounts]) -> Iterator[None]:
    """`scaled_dot_product_attention` as the op."""
    fast, original = torch.backends.mha.get_fastpath_enabled(), nn.functional.scaled_dot_product_attention

    def replacement(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **_) -> Tensor:  # type: ignore[no-untyped-def]
        o, found = block_skip_attention(
            q, k, v, threshold=THRESHOLD, br=TILE, bc=TILE, is_causal=is_causal, bias=attn_mask, return_stats=True
        )
        counts.append(found)
        return o

    torch.backends.mha.set_fastpath_enabled(False)
    nn.functional.scaled_dot_product_attention = replacement
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize("opset", [18, 23])
def test_transformer_encoder(opset: int) -> None:
    encoder, x = Encoder(), torch.randn(2, ROWS, 32, generator=torch.Generator().manual_seed(2))
    model = exported(encoder, x, opset=opset)
    report = through_rewriting(model)
    assert [entry.site.module for entry in report.rewritten] == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
    ]
    assert {entry.family for entry in report.rewritten} == {"decomposed" if opset == 18 else "Attention"}
    counts: list[TileCounts] = []
    with torch.no_grad(), sparse_sdpa(counts):
        expected = encoder(x).numpy()
    assert len(counts) == 2 and all(sum(entry.skipped) > 0 for entry in counts)
    np.testing.assert_allclose(run(model, x), expected, atol=1e-5)


class Attention(nn.Module):
    """`nn.MultiheadAttention` that also computes weights: batch and heads merged into one axis."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.rank = rank
        self.eval()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(x, x, x, attn_mask=mask, need_weights=True)[0]


def test_multihead_attention_with_weights_merges_heads() -> None:
    module, x = Attention(3), torch.randn(2, 19, 32)
    with torch.no_grad():
        expected = module(x).numpy()
    model = exported(module, x, opset=18)
    dense = ResolvedAttention(True, Thresholds(), br=TILE, bc=TILE)
    report = rewrite_attention(model, lambda site: dense)
    assert [entry.site.class_name for entry in report.rewritten] == ["MultiheadAttention"]
    finish(model)
    assert op_nodes(model)[0].inputs[0].shape[1] == 4
    np.testing.assert_allclose(run(model, x), expected, atol=1e-5)
