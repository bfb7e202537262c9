"""`sparsify`, its switches and its undoing: all or nothing, whatever the model is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_models import VOCABULARY, settings, tiny
from torch import Tensor, nn

from sparse_attention import (
    SparseAttentionError,
    attention_modules,
    disable,
    enable,
    layers_of,
    reset_statistics,
    restore,
    sparsify,
    summary,
)


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(1, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


PATHS = ["op", "softmax"]


@pytest.mark.parametrize("path", PATHS)
def test_switches_and_statistics(path: Any) -> None:
    model = tiny("llama")
    dense = logits(model)
    sparsify(model, settings(), path=path)
    sparse = logits(model)
    assert all(layer.sparsity > 0.1 for layer in summary(model))
    reset_statistics(model)
    assert all(layer.counts == {} for layer in summary(model))
    disable(model)
    assert (logits(model) - dense).abs().max() < (1e-6 if path == "op" else 1e-30)
    assert all(layer.sparsity == 0 and layer.counts for layer in summary(model))
    enable(model)
    assert torch.equal(logits(model), sparse)
    assert torch.equal(logits(restore(model)), dense)
    for switch in (disable, enable, summary, reset_statistics):
        with pytest.raises(SparseAttentionError, match="not sparsified"):
            switch(model)


def test_paths_agree_and_follow_each_other() -> None:
    """Both paths, one after the other on one model: the same tiles, and nothing of the first stays behind."""
    model = tiny("llama")
    found = []
    for path in ("softmax", "op", "softmax"):
        sparsify(model, settings(), path=path)  # type: ignore[arg-type]
        found.append((logits(model), [layer.counts for layer in summary(model)]))
        restore(model)
    assert torch.equal(found[0][0], found[2][0])
    assert (found[0][0] - found[1][0]).abs().max() < 1e-6
    assert found[0][1] == found[1][1] == found[2][1]


@pytest.mark.parametrize("path", PATHS)
def test_unmatched_modules_stay_dense(path: Any) -> None:
    model = tiny("llama")
    dense = logits(model)
    sparsify(model, {"sparse_cfg": {"*.1.self_attn": {"threshold": 0.7, "br": 4, "bc": 4}}}, path=path)
    assert (logits(model) - dense).abs().max() > 1e-4
    sparsity = {layer.name: layer.sparsity for layer in summary(model)}
    assert sparsity.pop("model.layers.1.self_attn") > 0.1
    assert all(value == 0 for value in sparsity.values())


def test_registry_and_plain_modules_in_one_model() -> None:
    """A Hugging Face model with a `nn.MultiheadAttention` in it: each kind enters by its own door."""
    model = tiny("llama")
    model.pool = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    assert [module.class_name for module in attention_modules(model)] == [
        "LlamaAttention", "LlamaAttention", "MultiheadAttention",
    ]  # fmt: skip
    sparsify(model, {"sparse_cfg": {"*att*": {"threshold": 0.7, "br": 4, "bc": 4}}})
    logits(model)
    x = torch.randn(1, 20, 32)
    model.pool(x, x, x, need_weights=False)
    assert [layer.class_name for layer in layers_of(model)] == [
        "LlamaAttention", "LlamaAttention", "MultiheadAttention",
    ]  # fmt: skip
    assert all(layer.counts for layer in summary(model))
    restore(model)
    sparsify(model, {"sparse_cfg": {"*self_attn": {}}})
    assert [layer.class_name for layer in layers_of(model)] == ["LlamaAttention", "LlamaAttention"]
    assert model.pool(x, x, x)[1] is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"path": "flash"}, "path='flash'"),
        ({"path": "softmax", "unit": "group"}, "unit='group'"),
    ],
)
def test_unknown_ways_are_refused(options: dict[str, Any], named: str) -> None:
    model = tiny("llama")
    with pytest.raises(SparseAttentionError, match=named):
        sparsify(model, settings(), **options)
    assert layers_of(model) == []


@pytest.mark.parametrize("path", PATHS)
def test_twice_is_refused(path: Any) -> None:
    model = sparsify(tiny("llama"), settings(), path=path)
    with pytest.raises(SparseAttentionError, match="sparsified already"):
        sparsify(model, settings())


def test_a_wrapper_around_a_registry_model_is_refused() -> None:
    with pytest.raises(SparseAttentionError, match="transformers model itself"):
        sparsify(nn.Sequential(tiny("llama")), settings())


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(SparseAttentionError, match="no module of this model computes attention"):
        sparsify(nn.Sequential(nn.Linear(2, 2)), settings())


def test_explicit_causality_must_agree() -> None:
    wrong = {"sparse_cfg": {"*att*": {"is_causal": False}}}
    with pytest.raises(SparseAttentionError, match="is_causal contradicts"):
        sparsify(tiny("llama"), wrong)
    assert layers_of(sparsify(tiny("bert"), wrong))


@pytest.mark.parametrize("path", PATHS)
def test_a_failure_halfway_changes_nothing(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second module cannot be installed: the first is undone."""
    from sparse_attention import functional, huggingface, softmax

    model = tiny("llama")
    dense = logits(model)

    def fail(*args: object) -> None:
        raise RuntimeError("no")

    if path == "softmax":
        original, calls = softmax.install, []

        def second_fails(module: nn.Module) -> None:
            calls.append(module)
            (original if len(calls) == 1 else fail)(module)

        monkeypatch.setattr(softmax, "install", second_fails)
    else:
        monkeypatch.setattr(huggingface, "install", fail)
    with pytest.raises(RuntimeError, match="no"):
        sparsify(model, settings(), path=path)
    assert layers_of(model) == []
    assert torch.equal(logits(model), dense)
    assert not any(functional._HOOK in module.__dict__ or "forward" in module.__dict__ for module in model.modules())


def test_gradients() -> None:
    """The op runs with parameters that require gradients and refuses the backward pass; the softmax path has one."""
    ids = torch.randint(1, VOCABULARY, (1, 40))
    model = sparsify(tiny("llama").requires_grad_(), settings())
    with pytest.raises(SparseAttentionError, match="no gradient"):
        model(ids).logits.sum().backward()
    restore(model)
    sparsify(model, settings(), path="softmax")(ids).logits.sum().backward()
    assert all(layer.sparsity > 0 for layer in summary(model))
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
