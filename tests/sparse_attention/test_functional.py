"""`nn.MultiheadAttention`, `nn.TransformerEncoder` and modules around `scaled_dot_product_attention` on the op."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from sparse_attention import (
    AttentionCall,
    SparseAttentionError,
    attention_modules,
    layers_of,
    observed,
    reference,
    restore,
    sparsify,
    summary,
)

CLOSE = 1e-5
SIZE, HEADS = 32, 4


def settings(threshold: float = 0.0, pattern: str = "*") -> dict[str, object]:
    return {"sparse_cfg": {pattern: {"threshold": threshold, "br": 4, "bc": 4}}}


def sharp(model: nn.Module) -> nn.Module:
    """Random weights with scores that spread enough to skip small tiles."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3 if "in_proj" in name or "qkv" in name else 0.1)
    return model.eval().requires_grad_(False)


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Bare(nn.Module):
    """Passes its arguments straight on."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(*args, **kwargs)


class ByMethod(nn.Module):
    """Self-attention whose SDPA call is in a method that is in a helper's closure."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(SIZE, 3 * SIZE)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


def attend_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class ByFunction(ByMethod):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_elsewhere(q, k, v)


class Block(nn.Module):
    """Computes nothing itself: not a candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.encoder = ByMethod(), nn.TransformerEncoderLayer(SIZE, HEADS, SIZE, batch_first=True)
        self.mlp = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.encoder(self.attention(x)))


def test_candidates() -> None:
    found = [(module.name, module.class_name) for module in attention_modules(Block())]
    assert found == [("attention", "ByMethod"), ("encoder.self_attn", "MultiheadAttention")]
    assert [module.class_name for module in attention_modules(ByFunction())] == ["ByFunction"]
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(SIZE, HEADS, SIZE), 1)
    assert [module.name for module in attention_modules(decoder)] == ["layers.0.self_attn", "layers.0.multihead_attn"]
    assert attention_modules(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))) == []


def qkv(hq: int = 4, hk: int = 4, sq: int = 37, sk: int = 37, dv: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return 3 * inputs(2, hq, sq, 8), inputs(2, hk, sk, 8, seed=1), inputs(2, hk, sk, dv, seed=2)


def additive(*shape: int) -> Tensor:
    bias = inputs(*shape, seed=5)
    return bias.masked_fill(bias > 1.2, float("-inf"))


SDPA_CASES: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "plain": (qkv(), {}),
    "causal": (qkv(), {"is_causal": True}),
    "causal_more_keys": (qkv(sq=20, sk=37), {"is_causal": True}),
    "causal_more_rows": (qkv(sq=37, sk=20), {"is_causal": True}),
    "lower_right": (qkv(sq=20, sk=37), {"attn_mask": causal_lower_right(20, 37)}),
    "upper_left": (qkv(sq=20, sk=37), {"attn_mask": causal_upper_left(20, 37)}),
    "grouped": (qkv(hk=2), {"enable_gqa": True, "is_causal": True}),
    "shared_head": (qkv(hk=1), {}),
    "value_size": (qkv(dv=5), {}),
    "scale": (qkv(), {"scale": 0.7}),
    "bool_2d": (qkv(), {"attn_mask": torch.ones(37, 37).tril(3).bool()}),
    "bool_padding": (qkv(), {"attn_mask": (torch.arange(37) < 30).expand(2, 1, 1, 37)}),
    "additive": (qkv(), {"attn_mask": additive(2, 4, 37, 37)}),
    "additive_per_head": (qkv(), {"attn_mask": additive(4, 37, 37)}),
    "three_dimensions": (tuple(x[:, 0] for x in qkv()), {"attn_mask": additive(2, 37, 37)}),
    "decode": (qkv(sq=1), {}),
    "keywords": ((), dict(zip(("query", "key", "value"), qkv(), strict=True))),
}


@pytest.mark.parametrize("case", SDPA_CASES)
def test_scaled_dot_product_attention(case: str) -> None:
    args, kwargs = SDPA_CASES[case]
    expected = F.scaled_dot_product_attention(*args, **kwargs)
    model = sparsify(Bare(), settings())
    found = model(*args, **kwargs)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < CLOSE
    assert sum(summary(model)[0].counts["decode" if case == "decode" else "prefill"].total) > 0


@pytest.mark.parametrize("case", SDPA_CASES)
def test_scaled_dot_product_attention_sparse(case: str) -> None:
    """With tiles skipped, every call follows the definition, and the output is what the module returns."""
    args, kwargs = SDPA_CASES[case]
    model = sparsify(Bare(), settings(0.7))
    expected: list[Tensor] = []

    def define(layer: object, call: AttentionCall, out: Tensor, counts: Tensor) -> None:
        o, tiles = reference.attention(
            call.q, call.k, call.v, threshold=0.7, br=4, bc=4, is_causal=call.is_causal, scale=call.scale,
            bias=call.bias, q_start=call.q_start,
        )  # fmt: skip
        assert torch.equal(tiles.counts, counts)
        expected.append(o)

    with observed(model, define):
        found = model(*args, **kwargs)
    assert (found - expected[0].reshape(found.shape)).abs().max() < CLOSE
    (counts,) = summary(model)[0].counts.values()
    assert sum(counts.skipped) > 0


REFUSED: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], str]] = {
    "dropout": (qkv(), {"dropout_p": 0.1}, "dropout"),
    "both": (qkv(), {"attn_mask": torch.ones(37, 37).bool(), "is_causal": True}, "is_causal at once"),
    "five": (tuple(x[None] for x in qkv()), {}, "unusual shape"),
    "heads": (qkv(hk=2), {}, "enable_gqa"),
    "batch": ((qkv()[0], *(x[:1] for x in qkv()[1:])), {}, "broadcast"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    args, kwargs, named = REFUSED[case]
    with pytest.raises(SparseAttentionError, match=named):
        sparsify(Bare(), settings())(*args, **kwargs)


@pytest.mark.parametrize("family", [ByMethod, ByFunction])
def test_hand_written(family: type[nn.Module]) -> None:
    model, x = sharp(family()), inputs(2, 37, SIZE)
    dense = model(x)
    assert (sparsify(copy.deepcopy(model), settings())(x) - dense).abs().max() < CLOSE
    sparse = sparsify(copy.deepcopy(model), settings(0.7))
    assert (sparse(x) - dense).abs().max() > 1e-4
    assert summary(sparse)[0].sparsity > 0.05
    assert torch.equal(restore(sparse)(x), dense)
    assert "forward" not in sparse.__dict__


def multihead(**options: Any) -> nn.MultiheadAttention:
    return sharp(nn.MultiheadAttention(SIZE, HEADS, **{"batch_first": True, **options}))  # type: ignore[return-value]


def padding(rows: int = 37, valid: int = 29) -> Tensor:
    """True = padding, as PyTorch has it, in the second of two sequences."""
    mask = torch.zeros(2, rows, dtype=torch.bool)
    mask[1, valid:] = True
    return mask


CAUSAL = torch.ones(37, 37).triu(1).bool()
MULTIHEAD_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no_bias": ({"bias": False}, {}),
    "sequence_first": ({"batch_first": False}, {}),
    "odd_sizes": ({"kdim": 20, "vdim": 12}, {}),
    "causal": ({}, {"attn_mask": CAUSAL, "is_causal": True}),
    "mask": ({}, {"attn_mask": torch.ones(37, 37).triu(4).bool()}),
    "mask_per_head": ({}, {"attn_mask": inputs(2 * HEADS, 37, 37) > 1.0}),
    "additive": ({}, {"attn_mask": additive(37, 37)}),
    "right_padding": ({}, {"key_padding_mask": padding()}),
    "left_padding": ({}, {"key_padding_mask": padding().flip(-1)}),
    "causal_and_padding": ({}, {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": padding()}),
    "additive_padding": ({}, {"key_padding_mask": torch.where(padding(), float("-inf"), 0.0)}),
    "finite_padding": ({}, {"key_padding_mask": torch.where(padding(), -1.5, 0.0)}),
    "additive_mask_and_padding": ({}, {"attn_mask": inputs(37, 37), "key_padding_mask": padding()}),
}


PADS_ROWS = ("right_padding", "causal_and_padding", "additive_padding", "additive_mask_and_padding")
"""Where the last keys are padding, so are the last rows of self-attention, and their outputs mean nothing."""


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(
    ("case", "cross"),
    [(case, cross) for case in MULTIHEAD_CASES for cross in (False, True) if cross or case != "odd_sizes"],
)
def test_multihead_attention(case: str, cross: bool) -> None:
    options, kwargs = MULTIHEAD_CASES[case]
    model = multihead(**options)
    q = inputs(*((2, 37) if model.batch_first else (37, 2)), SIZE)
    k = q if not cross else inputs(*q.shape[:2], model.kdim, seed=1)
    v = q if not cross else inputs(*q.shape[:2], model.vdim, seed=2)
    valid = torch.ones(2, 37, dtype=torch.bool)
    if not cross and case in PADS_ROWS:
        valid = ~padding()
    expected = model(q, k, v, need_weights=False, **kwargs)[0]
    sparsify(model, settings())
    found, weights = model(q, k, v, need_weights=False, **kwargs)
    assert weights is None
    if not model.batch_first:
        found, expected = found.transpose(0, 1), expected.transpose(0, 1)
    assert (found - expected)[valid].abs().max() < CLOSE
    restore(model)
    again = model(q, k, v, need_weights=False, **kwargs)[0]
    assert torch.equal(again if model.batch_first else again.transpose(0, 1), expected)


def test_unbatched() -> None:
    model, x = multihead(), inputs(37, SIZE)
    kwargs = {"key_padding_mask": padding()[1], "need_weights": False}
    expected = model(x, x, x, **kwargs)[0]
    found = sparsify(model, settings())(x, x, x, **kwargs)[0]
    assert found.shape == expected.shape
    assert (found - expected)[:29].abs().max() < CLOSE


@pytest.mark.parametrize(
    ("options", "named"), [({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "add_zero_attn")]
)
def test_appended_keys_are_refused_before_anything_changes(options: dict[str, Any], named: str) -> None:
    model = nn.ModuleDict({"first": multihead(), "second": multihead(**options)})
    with pytest.raises(SparseAttentionError, match=named):
        sparsify(model, settings())
    assert layers_of(model) == []
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())
    sparsify(model, {"sparse_cfg": {"*": {}, "second": {"enable": False}}})
    assert [layer.name for layer in layers_of(model)] == ["first"]


def test_multihead_refuses_by_name() -> None:
    x = inputs(2, 37, SIZE)
    with pytest.raises(SparseAttentionError, match=r"dropout=0.2[\s\S]*model.eval"):
        sparsify(multihead(dropout=0.2).train(), settings())(x, x, x, need_weights=False)
    with pytest.raises(SparseAttentionError, match="attn_mask=None"):
        sparsify(multihead(), settings())(x, x, x, need_weights=False, is_causal=True)


@pytest.mark.parametrize(
    "use",
    [lambda w: w.mean(), lambda w: w[0], lambda w: w * 2, lambda w: torch.stack([w]), lambda w: torch.zeros(1) + w],
)
def test_weights_nobody_uses_do_no_harm(use: Any) -> None:
    """`out, _ = mha(x, x, x)` is how most code calls it, with need_weights=True by default."""
    model, x = multihead(), inputs(2, 37, SIZE)
    expected, _ = model(x, x, x)
    out, weights = sparsify(model, settings())(x, x, x)
    assert (out - expected).abs().max() < CLOSE
    with pytest.raises(SparseAttentionError, match="need_weights=True"):
        use(weights)


def encoder(norm_first: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, SIZE, batch_first=True, norm_first=norm_first)
    return sharp(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "causal"])
def test_encoder_has_no_way_past_the_op(norm_first: bool, masks: str) -> None:
    """In eval mode without gradients PyTorch takes a fused call, and packs padded batches; the op is called anyway."""
    model, x = encoder(norm_first), inputs(2, 37, SIZE)
    kwargs: dict[str, Any] = {
        "none": {},
        "padding": {"src_key_padding_mask": padding()},
        "causal": {"mask": CAUSAL, "is_causal": True},
    }[masks]
    valid = ~padding() if masks == "padding" else torch.ones(2, 37, dtype=torch.bool)
    packs = model.use_nested_tensor
    with torch.inference_mode():
        expected = model(x, **kwargs)
        dense = sparsify(copy.deepcopy(model), settings())
        assert (dense(x, **kwargs) - expected)[valid].abs().max() < CLOSE
        sparse = sparsify(copy.deepcopy(model), settings(0.7))
        found = sparse(x, **kwargs)
        assert all(layer.counts["prefill"].total for layer in summary(sparse))
        assert all(layer.sparsity > 0 for layer in summary(sparse))
        assert (found - expected)[valid].abs().max() > 1e-4
        assert torch.equal(restore(sparse)(x, **kwargs), expected)
    assert sparse.use_nested_tensor == packs
    assert not any(module._forward_pre_hooks for module in sparse.modules())


def test_right_padding_changes_nothing() -> None:
    model = sparsify(encoder(), settings(0.7))
    x = inputs(2, 37, SIZE)
    together = model(x, src_key_padding_mask=padding())
    in_batch = [layer.counts["prefill"] for layer in summary(model)]
    for layer in layers_of(model):
        layer.statistics.reset()
    alone = model(x[:1]), model(x[1:, :29])
    assert (together[0] - alone[0][0]).abs().max() < CLOSE
    assert (together[1, :29] - alone[1][0]).abs().max() < CLOSE
    assert [layer.counts["prefill"] for layer in summary(model)] == in_batch
    assert sum(sum(counts.skipped) for counts in in_batch) > 0


def test_transformer_with_decoder() -> None:
    """Self, causal and cross attention of `nn.Transformer`, sequence first as it is by default."""
    model = nn.Transformer(SIZE, HEADS, 1, 1, SIZE)
    sharp(model)
    source, target = inputs(37, 2, SIZE), inputs(20, 2, SIZE, seed=1)
    kwargs = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(20), "memory_key_padding_mask": padding()}
    expected = model(source, target, **kwargs)
    dense = sparsify(copy.deepcopy(model), settings())
    assert (dense(source, target, **kwargs) - expected).abs().max() < CLOSE
    sparse = sparsify(model, settings(0.7))
    sparse(source, target, **kwargs)
    assert [layer.name for layer in summary(sparse) if layer.sparsity > 0] == [
        "encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn",
    ]  # fmt: skip


def test_modules_that_no_pattern_enables_are_left_alone() -> None:
    model = sharp(Block())
    sparsify(model, settings(0.7, "attention"))
    assert [layer.name for layer in layers_of(model)] == ["attention"]
    assert not model.encoder.self_attn._forward_pre_hooks  # type: ignore[union-attr]
    assert "forward" not in model.encoder.self_attn.__dict__  # type: ignore[union-attr]


def test_copies_are_independent() -> None:
    model, x = sparsify(sharp(ByMethod()), settings(0.7)), inputs(2, 37, SIZE)
    expected = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.qkv.weight.zero_()  # type: ignore[union-attr, operator]
    assert not torch.equal(twin(x), expected)
    restore(twin)
    assert torch.equal(model(x), expected)


def test_threads_do_not_see_each_other() -> None:
    dense, x = sharp(ByMethod()), inputs(2, 37, SIZE)
    sparse = sparsify(copy.deepcopy(dense), settings(0.7))
    expected = dense(x), sparse(x)
    once = summary(sparse)[0].counts["prefill"]
    wrong: list[int] = []

    def work(which: int) -> None:
        wrong.extend(which for _ in range(10) if not torch.equal((dense, sparse)[which](x), expected[which]))

    threads = [threading.Thread(target=functools.partial(work, which)) for which in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert summary(sparse)[0].counts["prefill"].total == tuple(21 * count for count in once.total)


def test_an_exception_leaves_nothing_behind() -> None:
    model = sparsify(Bare(), settings())
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 7), torch.zeros(2, 4, 5, 8))
    assert torch.overrides._get_current_function_mode() is None
    args = qkv()
    assert torch.equal(F.scaled_dot_product_attention(*args), Bare()(*args))


@pytest.mark.parametrize("padded", [False, True])
def test_export_holds_the_op(padded: bool) -> None:
    """Non-strict export sees one op a layer, for any batch and length, and it computes what the model computes."""
    model = sparsify(encoder(), settings(0.7))
    kwargs = {"src_key_padding_mask": padding()} if padded else {}
    shapes: dict[str, Any] = {"src": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    if padded:
        shapes["src_key_padding_mask"] = shapes["src"]
    program = torch.export.export(model, (inputs(2, 37, SIZE),), kwargs, dynamic_shapes=shapes, strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("sparse_attention.block_skip_attention.default") == 2
    assert not any("softmax" in target or "scaled_dot_product" in target for target in targets)
    other = {"src_key_padding_mask": padding(23, 11)} if padded else {}
    x = inputs(2, 23, SIZE, seed=4)
    valid = ~padding(23, 11) if padded else torch.ones(2, 23, dtype=torch.bool)
    assert (program.module()(x, **other) - model(x, **other))[valid].abs().max() < CLOSE
    assert any(layer.sparsity > 0 for layer in summary(model))


class Either(ByMethod):
    """Attention with a switch, as many models have it."""

    fused = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.fused else x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def test_a_branch_past_the_op_is_an_error() -> None:
    model, x = sparsify(sharp(Either()), settings()), inputs(2, 37, SIZE)
    model(x)
    model.fused = False  # type: ignore[assignment]
    with pytest.raises(SparseAttentionError, match="without scaled_dot_product_attention"):
        model(x)
