"""Padding, masks and caches of Hugging Face models through the attention registry, against eager attention."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from attention_models import DECODERS, FAMILIES, VOCABULARY, settings, tiny
from torch import Tensor, nn

import sparse_attention
from sparse_attention import AttentionCall, AttentionLayer, SparseAttentionError, observed, reference, sparsify, summary

# Measured: 1e-6 at most (T5, whose scores are not scaled); BERT and BART end in a LayerNorm, 5e-7.
CLOSE = 1e-5
LENGTH = 60
SHORTER = 41

Case = dict[str, Any]


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def padding(side: str) -> Tensor:
    """The second of two sequences is padded; `holes` takes single tokens out of its middle as well."""
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    if side == "right":
        mask[1, SHORTER:] = 0
    elif side == "left":
        mask[1, : LENGTH - SHORTER] = 0
    else:
        mask[1, [7, 8, 30]] = 0
        mask[1, SHORTER:] = 0
    return mask


def four_dimensional() -> Tensor:
    """An additive mask of the user's own: causal, and the first sequence does not see its keys 5 to 9."""
    visible = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    visible[0, :, 10:, 5:10] = False
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


def packed() -> Tensor:
    """Positions of two sequences in one row."""
    positions = torch.cat([torch.arange(SHORTER), torch.arange(LENGTH - SHORTER)])
    return positions.expand(2, LENGTH)


def case_of(name: str) -> tuple[Case, Tensor]:
    """Inputs of a case, and which rows `[2, LENGTH] bool` are valid."""
    every = torch.ones(2, LENGTH, dtype=torch.bool)
    inputs: Case = {"input_ids": tokens()}
    if name in ("right", "left", "holes"):
        inputs["attention_mask"] = padding(name)
        return inputs, inputs["attention_mask"].bool()
    if name == "packed":
        inputs |= {"position_ids": packed(), "use_cache": False}
    if name == "4d":
        inputs["attention_mask"] = four_dimensional()
    return inputs, every


def sparse_pair(family: str, threshold: float) -> tuple[nn.Module, nn.Module]:
    """The same model on the op and on the softmax path."""
    model = tiny(family)
    return (
        sparsify(copy.deepcopy(model), settings(threshold)),
        sparsify(copy.deepcopy(model), settings(threshold), path="softmax"),
    )


def skipped(model: nn.Module) -> list[tuple[int, ...]]:
    return [counts.skipped for layer in summary(model) for counts in layer.counts.values()]


CASES = [
    *((family, case) for family in DECODERS for case in ("none", "right", "left", "holes", "packed", "4d")),
    *(("bert", case) for case in ("none", "right", "left", "holes")),
]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_dense_equals_eager(family: str, case: str) -> None:
    inputs, valid = case_of(case)
    model = tiny(family)
    expected = outputs(model, **inputs)
    found = outputs(sparsify(model, settings(0.0)), **inputs)
    assert (found - expected)[valid].abs().max() < CLOSE


@pytest.mark.parametrize(("family", "case"), [c for c in CASES if c[1] not in ("right", "holes")])
def test_sparse_equals_softmax_path(family: str, case: str) -> None:
    """Right padding is left out: its rows vote in the softmax, which cannot know them."""
    inputs, valid = case_of(case)
    op, softmax = sparse_pair(family, 0.7)
    difference = (outputs(op, **inputs) - outputs(softmax, **inputs))[valid].abs().max()
    assert skipped(op) == skipped(softmax)
    assert sum(map(sum, skipped(op))) > 100
    assert difference < CLOSE


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_right_padding_changes_nothing(family: str) -> None:
    """Padded and alone, with tiles skipped: the same decisions and, but for the other layers' rounding, outputs."""
    model = sparsify(tiny(family), settings(0.7))
    together = outputs(model, input_ids=tokens(), attention_mask=padding("right"))
    in_batch = skipped(model)
    sparse_attention.reset_statistics(model)
    for row, length in enumerate((LENGTH, SHORTER)):
        alone = outputs(model, input_ids=tokens()[row : row + 1, :length])
        assert (together[row, :length] - alone[0]).abs().max() < CLOSE
    assert skipped(model) == in_batch
    assert sum(map(sum, in_batch)) > 100


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_encoder_decoder(family: str, side: str) -> None:
    """Self, causal and cross attention with a padded encoder, dense against eager and sparse against softmax."""
    inputs: Case = {"input_ids": tokens(), "decoder_input_ids": tokens(length=SHORTER, seed=1)}
    if side != "none":
        inputs["attention_mask"] = padding(side)
    expected = outputs(tiny(family), **inputs)
    assert (outputs(sparsify(tiny(family), settings(0.0)), **inputs) - expected).abs().max() < CLOSE
    op, softmax = sparse_pair(family, 0.7)
    found, patched = outputs(op, **inputs), outputs(softmax, **inputs)
    assert sum(map(sum, skipped(op))) > 100
    if side == "none":
        assert skipped(op) == skipped(softmax)
        assert (found - patched).abs().max() < CLOSE


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("rows", [SHORTER, LENGTH])
def test_right_padded_encoder_changes_nothing(family: str, rows: int) -> None:
    """`rows = LENGTH` is the shape in which cross-attention cannot be told from self-attention by its lengths."""
    model = sparsify(tiny(family), settings(0.7))
    target = tokens(length=rows, seed=1)
    together = outputs(model, input_ids=tokens(), attention_mask=padding("right"), decoder_input_ids=target)
    alone = outputs(model, input_ids=tokens()[1:, :SHORTER], decoder_input_ids=target[1:])
    assert (together[1] - alone[0]).abs().max() < CLOSE


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left_padded"])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_caches(family: str, kind: str, padded: bool, threshold: float) -> None:
    """Prefill, a chunk and tokens past the sliding window, against eager (dense) or the softmax path (sparse)."""
    from transformers import DynamicCache, StaticCache

    op, softmax = sparse_pair(family, threshold)
    models = [op, tiny(family) if threshold == 0 else softmax]
    found: list[list[Tensor]] = []
    mask = padding("left") if padded else torch.ones(2, LENGTH, dtype=torch.int64)
    for model in models:
        cache = StaticCache(config=model.config, max_cache_len=72) if kind == "static" else DynamicCache(
            config=model.config
        )  # fmt: skip
        steps, start = [], 0
        for count in (30, 20, *(1,) * 10):
            stop = start + count
            inputs: Case = {"input_ids": tokens()[:, start:stop], "past_key_values": cache}
            if padded:
                inputs["attention_mask"] = mask[:, :stop]
            steps.append(outputs(model, **inputs))
            start = stop
        found.append(steps)
    whole = torch.cat(found[0], dim=1)
    assert (whole - torch.cat(found[1], dim=1))[mask.bool()].abs().max() < CLOSE
    phases = summary(op)[0].counts
    assert set(phases) == {"prefill", "decode"}
    if threshold:
        assert skipped(op) == skipped(softmax)
        assert all(sum(counts.skipped) > 0 for counts in phases.values())


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "bert", "t5"])
def test_every_call_follows_the_reference(family: str) -> None:
    """Each layer's own q, k, v, mask, window, soft-cap and sinks, with left padding, through the definition."""
    model = sparsify(tiny(family), settings(0.7))
    seen: list[AttentionCall] = []

    def check(layer: AttentionLayer, call: AttentionCall, out: Tensor, counts: Tensor) -> None:
        seen.append(call)
        expected, tiles = reference.attention(
            call.q, call.k, call.v, threshold=layer.thresholds, br=4, bc=4, is_causal=call.is_causal, scale=call.scale,
            softcap=call.softcap, bias=call.bias, window=call.window, kv_lengths=call.kv_lengths,
            q_start=call.q_start, q_lengths=call.q_lengths, sinks=call.sinks,
        )  # fmt: skip
        assert torch.equal(counts, tiles.counts)
        assert (out - expected).abs().max() < CLOSE

    inputs: Case = {"input_ids": tokens(), "attention_mask": padding("left")}
    if family == "t5":
        inputs["decoder_input_ids"] = tokens(length=SHORTER)
    with observed(model, check):
        outputs(model, **inputs)
    assert len(seen) == len(summary(model))
    assert any(call.window for call in seen) == (family in ("mistral", "gemma2", "gpt_oss"))
    assert any(call.softcap for call in seen) == (family == "gemma2")
    assert any(call.sinks is not None for call in seen) == (family == "gpt_oss")
    assert any(call.bias is not None for call in seen)


def test_causal_attention_needs_no_mask() -> None:
    """Without padding nothing is materialised, and grouped heads are not expanded."""
    model = sparsify(tiny("mistral"), settings())
    seen: list[AttentionCall] = []
    with observed(model, lambda layer, call, out, counts: seen.append(call)):
        outputs(model, input_ids=tokens())
    for call in seen:
        assert call.bias is None and call.kv_lengths is None and call.q_start is None
        assert call.is_causal and call.window == 24
        assert call.k.shape[1] == 2 and call.q.shape[1] == 4


@pytest.mark.parametrize(
    ("inputs", "named"),
    [({"output_attentions": True}, "output_attentions"), ({"head_mask": torch.ones(2, 4)}, "head_mask")],
)
def test_refused_by_name(inputs: Case, named: str) -> None:
    model = sparsify(tiny("llama"), settings())
    with pytest.raises(SparseAttentionError, match=named):
        outputs(model, input_ids=tokens(), **inputs)


def test_dropout_is_refused() -> None:
    model = tiny("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(SparseAttentionError, match=r"dropout=0.1[\s\S]*model.eval"):
        outputs(sparsify(model, settings()), input_ids=tokens())


def test_mask_work_of_the_model_is_refused() -> None:
    """A model that slices or reads its mask meets an object that says so, not a wrong mask."""
    from sparse_attention.visibility import Visibility

    with pytest.raises(SparseAttentionError, match="shape"):
        _ = Visibility().shape
    with pytest.raises(SparseAttentionError, match="slice"):
        _ = Visibility()[:, :, 3:]
    assert copy.deepcopy(Visibility(is_causal=True)).is_causal


def is_registered() -> bool:
    from transformers import AttentionInterface, AttentionMaskInterface

    from sparse_attention.huggingface import REGISTERED_NAME

    found = {REGISTERED_NAME in interface._global_mapping for interface in (AttentionInterface, AttentionMaskInterface)}
    assert len(found) == 1
    return found.pop()


def test_nothing_stays_registered() -> None:
    gc.collect()
    assert not is_registered()
    model = sparsify(tiny("llama"), settings())
    assert is_registered()
    sparse_attention.restore(model)
    assert not is_registered()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(outputs(model, input_ids=tokens()), outputs(tiny("llama"), input_ids=tokens()))


def test_copies_outlive_the_model() -> None:
    """Deep and pickled copies keep the registration; the last one to go takes it along."""
    model = sparsify(tiny("llama"), settings())
    expected = outputs(model, input_ids=tokens())
    pickled, twin = pickle.dumps(model), copy.deepcopy(model)
    del model
    gc.collect()
    assert torch.equal(outputs(twin, input_ids=tokens()), expected)
    del twin
    gc.collect()
    assert not is_registered()
    loaded = pickle.loads(pickled)
    assert torch.equal(outputs(loaded, input_ids=tokens()), expected)
    assert summary(loaded)[0].sparsity > 0
    sparse_attention.restore(loaded)
    assert not is_registered()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_found(family: str) -> None:
    found = sparse_attention.attention_modules(tiny(family))
    assert len(found) == (6 if family in ("bart", "t5") else 2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "bert"])
@pytest.mark.parametrize("padded", [False, True])
def test_export_holds_the_op(family: str, padded: bool) -> None:
    """Non-strict export with any batch, length and padding computes what the model computes, tiles skipped."""
    model = sparsify(tiny(family), settings(0.7))
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example: Case = {"input_ids": tokens()} | ({"attention_mask": padding("right")} if padded else {})
    shapes: Case = dict.fromkeys(example, free)
    if family != "bert":
        example["use_cache"], shapes["use_cache"] = False, None
    program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("sparse_attention.block_skip_attention.default") == 2
    assert not any("scaled_dot_product" in target for target in targets)

    other: Case = {**example, "input_ids": tokens(batch=3, length=50, seed=3)}
    valid = torch.ones(3, 50, dtype=torch.int64)
    if padded:
        valid[1, 30:], valid[2, :7] = 0, 0
        other["attention_mask"] = valid
    difference = outputs(program.module(), **other) - outputs(model, **other)
    assert difference[valid.bool()].abs().max() < CLOSE
    assert all(layer.sparsity > 0 for layer in summary(model))
