"""Softmax patching: what it decides, and that nothing outside of one module's forward notices it."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from attention_models import VOCABULARY, settings, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_attention import (
    SparseAttentionError,
    attention_modules,
    layers_of,
    observed,
    reference,
    restore,
    sparsify,
    summary,
)
from sparse_attention.layer import AttentionLayer
from sparse_attention.patterns import ResolvedAttention
from sparse_attention.softmax import SoftmaxPatch, skipped_hidden, tile_maxima
from sparse_attention.threshold import PhaseThreshold, Thresholds

SHAPES = [(1, 1), (1, 129), (113, 203), (511, 511), (128, 512), (60, 64)]


def layer(threshold: object, br: int = 16, bc: int = 16) -> AttentionLayer:
    return AttentionLayer("probe", "Probe", ResolvedAttention(True, Thresholds.of(threshold), br=br, bc=bc))


def masked_scores(rows: int, columns: int, *, causal: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[2, 3, rows, columns]`, about every other tile of 16 columns low; hidden pairs as eager masks leave them."""
    generator = torch.Generator().manual_seed(rows + columns)
    scores = torch.randn(2, 3, rows, columns, generator=generator)
    low = torch.rand(2, 3, 1, -(-columns // 16), generator=generator) < 0.5
    low[..., 0] = False
    scores -= 8.0 * low.repeat_interleave(16, dim=-1)[..., :columns]
    if causal:
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
        scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
    return scores.to(dtype)


def patched(probe: AttentionLayer, scores: Tensor, has_sink: bool = False, **kwargs: Any) -> Tensor:
    patch = SoftmaxPatch(probe, has_sink=has_sink)
    patch._products.add(scores.shape[-1] - has_sink)
    with patch:
        return F.softmax(scores, dim=-1, **kwargs)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tile", [(16, 16), (32, 8), (1, 16)])
def test_decides_as_the_reference(rows: int, columns: int, causal: bool, tile: tuple[int, int]) -> None:
    br, bc = tile
    scores = masked_scores(rows, columns, causal=causal)
    given = scores.clone()
    probe = layer(0.3, br, bc)
    found = patched(probe, scores)
    assert torch.equal(scores, given)

    br = 1 if rows == 1 else br
    visible = torch.where(scores < torch.finfo(torch.float32).min / 2, -math.inf, scores)
    tiles = reference.decide_tiles(visible, 0.3, br, bc)
    pairs = tiles.kept.repeat_interleave(br, 2)[:, :, :rows].repeat_interleave(bc, 3)[..., :columns]
    expected = torch.softmax(visible.masked_fill(~pairs, -math.inf), dim=-1)
    assert (found - expected).abs().max() < 1e-6
    (counts,) = probe.statistics.by_phase.values()
    assert [counts.skipped, counts.total] == [tuple(column) for column in tiles.counts.t().tolist()]
    if columns > 100:
        assert sum(counts.skipped) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32])
def test_dense_is_bit_identical(dtype: torch.dtype, asked: torch.dtype | None) -> None:
    scores = masked_scores(113, 203, causal=True, dtype=dtype)
    probe = layer(0.0)
    assert torch.equal(patched(probe, scores, dtype=asked), F.softmax(scores, dim=-1, dtype=asked))
    assert sum(probe.statistics.by_phase["prefill"].total) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_masks_hide(dtype: torch.dtype) -> None:
    """The minimum of the scores' own dtype means invisible: such tiles do not exist."""
    probe = layer(0.3)
    patched(probe, masked_scores(64, 64, causal=True, dtype=dtype), dtype=torch.float32)
    assert probe.statistics.by_phase["prefill"].total == (20, 20, 20)


@pytest.mark.parametrize("spelling", ["functional", "torch", "method", "module", "keywords"])
def test_every_spelling_of_softmax(spelling: str) -> None:
    scores = masked_scores(64, 64, causal=False)
    expected = patched(layer(0.3), scores)
    patch = SoftmaxPatch(layer(0.3))
    query, key = torch.eye(64).expand(2, 3, 64, 64), scores.transpose(-1, -2).contiguous()
    with patch:
        product = query @ key.transpose(-1, -2)
        found = {
            "functional": lambda: F.softmax(product, -1),
            "torch": lambda: torch.softmax(product, 3),
            "method": lambda: product.softmax(dim=-1),
            "module": lambda: nn.Softmax(dim=-1)(product),
            "keywords": lambda: F.softmax(input=product, dim=3, dtype=torch.float32),
        }[spelling]()
    assert patch.applied
    assert torch.equal(found, expected)
    assert not torch.equal(found, F.softmax(scores, -1))


def test_other_softmaxes_are_left_alone() -> None:
    """A router's softmax, and one over another dimension, are no attention."""
    scores = masked_scores(64, 64, causal=False)
    patch = SoftmaxPatch(layer(0.3))
    with patch:
        assert torch.equal(F.softmax(scores[0, 0], -1), torch.softmax(scores[0, 0], -1))
        assert torch.equal(F.softmax(scores, 1), torch.softmax(scores, 1))
    assert not patch.applied


@pytest.mark.parametrize("keys", [64, 60])
@pytest.mark.parametrize("rows", [64, 1])
def test_a_sink_is_always_kept(keys: int, rows: int) -> None:
    scores = masked_scores(rows, keys, causal=False)
    scores[..., 48:] = -30.0  # the last tile, into which the sink would fall where it is not full, is skipped
    with_sink = torch.cat([scores, torch.full((2, 3, rows, 1), 0.5)], dim=-1)
    found = patched(layer(0.3), with_sink, has_sink=True)
    weights = patched(layer(0.3), scores)
    assert not bool(weights[..., 48:].any())
    total = torch.where(weights > 0, scores, -math.inf).logsumexp(-1)
    assert (found[..., -1] - torch.sigmoid(0.5 - total)).abs().max() < 1e-6
    assert (found[..., :-1].sum(-1) + found[..., -1] - 1).abs().max() < 1e-6


def test_an_unexplained_column_is_an_error() -> None:
    patch = SoftmaxPatch(layer(0.3))
    patch._products.add(64)
    with pytest.raises(SparseAttentionError, match="not the product of queries and keys"), patch:
        F.softmax(torch.randn(1, 2, 64, 65), dim=-1)


def test_phases() -> None:
    probe = layer({"prefill": 0.3, "decode": 0.0})
    one, many = masked_scores(1, 203, causal=False), masked_scores(64, 203, causal=False)
    assert torch.equal(patched(probe, one), F.softmax(one, -1))
    assert not torch.equal(patched(probe, many), F.softmax(many, -1))
    assert set(probe.statistics.by_phase) == {"prefill", "decode"}


def test_calibrated_threshold_follows_the_visible_length() -> None:
    """λ = a / L with L the last key that is seen, also where the cache is longer."""
    scores = masked_scores(32, 96, causal=False)
    longer = torch.cat([scores, torch.full((2, 3, 32, 160), torch.finfo(torch.float32).min)], dim=-1)
    calibrated, static = layer(PhaseThreshold(a=28.8)), layer(0.3)
    expected = patched(static, scores)
    assert torch.equal(patched(calibrated, scores), expected)
    assert torch.equal(patched(calibrated, longer)[..., :96], expected)
    assert sum(static.statistics.by_phase["prefill"].skipped) > 0


@pytest.mark.parametrize("error", [RuntimeError("inside"), KeyboardInterrupt()])
def test_scores_are_written_back_after_an_error(error: BaseException) -> None:
    scores = masked_scores(64, 64, causal=False)
    given = scores.clone()
    tiles = reference.decide_tiles(tile_maxima(scores, 16), 0.3, 16, 1)
    with pytest.raises(type(error)), skipped_hidden(scores, tiles.exists & ~tiles.kept, 16, 16, 64):
        assert not torch.equal(scores, given)
        raise error
    assert torch.equal(scores, given)


def test_gradients_flow() -> None:
    scores = masked_scores(64, 64, causal=False).requires_grad_()
    out = patched(layer(0.3), scores * 1.0)
    (out**2).sum().backward()
    assert scores.grad is not None
    kept = out.detach() > 0
    assert not bool(kept.all())
    assert torch.equal(scores.grad[~kept], torch.zeros_like(scores.grad[~kept]))


def tokens(length: int = 60) -> Tensor:
    return torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, length: int = 60) -> Tensor:
    with torch.no_grad():
        out = model(tokens(length))
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_at_zero_is_bit_identical(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    dense = logits(model)
    assert torch.equal(logits(sparsify(model, settings(0.0), path="softmax")), dense)
    assert all(layer.sparsity == 0 and layer.counts for layer in summary(model))


def test_only_matched_modules_change_and_restore_undoes() -> None:
    model = tiny("llama")
    dense = logits(model)
    forward = type(model.model.layers[0].self_attn).forward
    sparsify(model, {"sparse_cfg": {"*.1.self_attn": {"threshold": 0.7, "br": 4, "bc": 4}}}, path="softmax")
    assert [layer.name for layer in layers_of(model)] == ["model.layers.1.self_attn"]
    assert type(model.model.layers[0].self_attn).forward is forward
    assert not torch.equal(logits(model), dense)
    restore(model)
    assert torch.equal(logits(model), dense)
    assert "forward" not in model.model.layers[1].self_attn.__dict__


def test_copies_have_their_own_patch() -> None:
    model = sparsify(tiny("llama"), settings(), path="softmax")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in twin.model.layers:
            layer.self_attn.v_proj.weight.mul_(2)
    before = logits(model)
    assert not torch.equal(logits(twin), before)
    assert summary(twin)[0].counts == summary(model)[0].counts
    restore(twin)
    assert torch.equal(logits(model), before)


def test_an_exception_leaves_nothing_behind() -> None:
    model = sparsify(tiny("llama"), settings(), path="softmax")
    expected = logits(model)

    def fail(*args: object) -> None:
        raise RuntimeError("inside the module")

    handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside the module"):
        logits(model)
    scores = masked_scores(64, 64, causal=False)
    assert torch.overrides._get_current_function_mode() is None
    assert torch.equal(F.softmax(scores, -1), torch.softmax(scores, -1))
    handle.remove()
    assert torch.equal(logits(model), expected)


def test_threads_do_not_see_each_other() -> None:
    """A dense model runs beside a sparse one, and both beside themselves; every count arrives."""
    dense, sparse = tiny("llama"), sparsify(tiny("llama"), settings(), path="softmax")
    expected = [logits(dense), logits(sparse)]
    once = summary(sparse)[0].counts["prefill"]
    assert sum(once.skipped) > 0
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(6):
            if not torch.equal(logits((dense, sparse)[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert summary(sparse)[0].counts["prefill"].total == tuple(13 * count for count in once.total)


@pytest.mark.parametrize("implementation", ["sdpa"])
def test_needs_eager(implementation: str) -> None:
    model = tiny("llama", implementation=implementation)
    with pytest.raises(SparseAttentionError) as caught:
        sparsify(model, settings(), path="softmax")
    message = str(caught.value)
    assert "Requires model to be loaded with attn_implementation='eager'" in message
    assert "sdpa" in message and 'path="op"' in message
    assert layers_of(model) == []
    sparsify(model, settings())


def test_needs_eager_later_too() -> None:
    model = sparsify(tiny("llama"), settings(), path="softmax")
    model.set_attn_implementation("sdpa")
    with pytest.raises(SparseAttentionError, match="attn_implementation='eager'"):
        logits(model)


def test_plain_modules_have_no_softmax_to_patch() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).eval()
    assert len(attention_modules(model)) == 1
    with pytest.raises(SparseAttentionError, match="attn_implementation='eager'"):
        sparsify(model, {"sparse_cfg": {"self_attn": {}}}, path="softmax")


def test_export_is_refused() -> None:
    model = sparsify(tiny("llama"), settings(), path="softmax")
    with pytest.raises(Exception, match="cannot be traced"):
        torch.export.export(model, (tokens(),), strict=False)


def test_observation_is_refused() -> None:
    model = sparsify(tiny("llama"), settings(), path="softmax")
    with pytest.raises(SparseAttentionError, match="observe"), observed(model, lambda *_: None):
        logits(model)
    assert logits(model).isfinite().all()


class HandWrittenAttention(nn.Module):
    """No registry, no scaled_dot_product_attention: products and a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        scores = torch.einsum("bhid,bhjd->bhij", 3 * q, q)
        return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)


def test_attention_written_by_hand() -> None:
    model, x = nn.ModuleDict({"block": HandWrittenAttention()}), torch.randn(2, 60, 32)
    dense = model["block"](x)
    assert attention_modules(model) == []
    assert [module.name for module in attention_modules(model, path="softmax")] == ["block"]
    sparsify(model, {"sparse_cfg": {"*": {"threshold": 0.0}}}, path="softmax")
    assert torch.equal(model["block"](x), dense)
    restore(model)
    sparsify(model, {"sparse_cfg": {"*": {"threshold": 0.7, "br": 4, "bc": 4}}}, path="softmax")
    assert not torch.equal(model["block"](x), dense)
    assert summary(model)[0].sparsity > 0.1


def test_models_without_the_registry() -> None:
    """BLOOM computes its own attention, with ALiBi: on the softmax path it is sparse like any other."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.self_attention.query_key_value.weight.normal_(0.0, 0.5)
    dense = logits(model)
    assert torch.equal(logits(sparsify(model, settings(0.0), path="softmax")), dense)
    sparsify(restore(model), settings(0.9), path="softmax")
    assert not torch.equal(logits(model), dense)
    assert all(layer.sparsity > 0 for layer in summary(model))
