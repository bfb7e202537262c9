"""The op on a CPU: what the definition says, without a full score matrix and without the work of skipped tiles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparse_attention import Thresholds, block_skip_attention, cpu, reference
from tests.attention_calls import SHAPES, Call, calls, int32, peaky_call

OUTPUT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative to max|v|
BAND = 2e-4


def assert_like_reference(call: Call) -> tuple[int, int]:
    """Decisions equal outside the band, outputs on the same decisions; returns tiles skipped and in all."""
    out, counts = call.run()
    expected, tiles = reference.attention(*call.qkv, **call.keywords())
    rows, columns, batch = call.tensors["q"].shape[2], call.tensors["k"].shape[2], call.tensors["q"].shape[0]
    lengths = call.tensors.get("kv_lengths", torch.full((batch,), columns))
    threshold = Thresholds.of(call.thresholds).phase(rows)
    lam = reference.effective_threshold(threshold, lengths, call.tensors.get("threshold_scale"))
    in_band = ((tiles.gap - torch.log(lam).view(-1, 1, 1, 1)).abs() < BAND).any()
    if not in_band:
        assert torch.equal(counts, tiles.counts)
        tolerance = OUTPUT[out.dtype] * max(1.0, float(call.tensors["v"].abs().max()))
        assert (out.float() - expected).abs().max() <= tolerance
    return int(counts[:, 0].sum()), int(counts[:, 1].sum())


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_against_reference(call: Call) -> None:
    assert_like_reference(call)


def features(rows: int, columns: int) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)

    def open_(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) < 0.8

    additive = torch.randn(2, 1, rows, columns, generator=generator).masked_fill(~open_(1, 1, 1, columns), -math.inf)
    length = int32(columns, max(1, columns // 2 + 1))
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "causal_upper_left": {"is_causal": True, "q_start": int32(0, 0)},
        "window": {"is_causal": True, "window": 37},
        "window_without_causality": {"window": 37},
        "softcap": {"softcap": 3.0, "is_causal": True},
        "mask_per_key": {"bias": open_(2, 1, 1, columns)},
        "mask_per_head_and_row": {"bias": open_(1, 4, rows, 1), "is_causal": True},
        "additive": {"bias": additive},
        "lengths": {"kv_lengths": length, "q_lengths": int32(rows, max(0, rows - 3)), "is_causal": True},
        "preallocated_cache": {"kv_lengths": length, "q_start": length - rows, "is_causal": True},
        "sinks": {"sinks": torch.tensor([-1.0, 0.0, 2.0, 9.0])},
        "group": {"unit": "group", "is_causal": True},
        "scaled_threshold": {"threshold_scale": torch.tensor([0.5])},
        "values_of_another_size": {"v_size": 5, "size": 12},
        "many_heads_a_key_head": {"kv_heads": 1},
    }  # fmt: skip


FEATURES = list(features(1, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("feature", FEATURES)
def test_shapes_and_features(shape: tuple[int, int], feature: str) -> None:
    skipped = total = 0
    for br, bc in ((32, 32), (64, 16), (128, 128)):
        more = {"batch": 2, "threshold": 0.3, "br": br, "bc": bc} | features(*shape)[feature]
        found = assert_like_reference(peaky_call(*shape, sharpness=0.7, **more))
        skipped, total = skipped + found[0], total + found[1]
    if total > 60:
        assert skipped > 0, "nothing was skipped, so nothing was tested"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature", ["causal", "additive", "sinks", "lengths", "decode"])
def test_half_precision(dtype: torch.dtype, feature: str) -> None:
    """Scores, decisions and sums are float32; only the inputs and the output are rounded."""
    rows = 1 if feature == "decode" else 113
    call = peaky_call(rows, 203, batch=2, threshold=0.3, **features(rows, 203).get(feature, {})).to(dtype)
    out, _ = call.run()
    assert out.dtype == dtype
    skipped, _ = assert_like_reference(call)
    assert skipped > 0


@pytest.mark.parametrize("rows", [1, 70, 128])
@pytest.mark.parametrize("more", [{}, {"is_causal": True}, {"sinks": torch.zeros(4)}])
def test_zero_is_dense_bit_for_bit(rows: int, more: dict[str, Any]) -> None:
    """λ = 0, an unusable λ, a scale of 0, and a λ that happens to skip nothing: the same bits."""
    call = peaky_call(rows, 300, batch=2, **more)
    dense, counts = call.with_threshold(0.0).run()
    assert not counts[:, 0].any()
    assert not torch.equal(call.run()[0], dense)
    for same in (call.with_threshold(1.0), call.with_threshold(math.nan), call.with_threshold(1e-38)):
        assert torch.equal(same.run()[0], dense)
    off = Call(call.tensors | {"threshold_scale": torch.zeros(1)}, call.options, call.thresholds)
    assert torch.equal(off.run()[0], dense)


@pytest.mark.parametrize("more", [{}, {"is_causal": True}, {"is_causal": True, "window": 40}])
def test_right_padding_is_exact(more: dict[str, Any]) -> None:
    """Bit for bit, with NaN in the padding; two batch elements of different length in one call."""
    options = {"br": 32, "bc": 32, **more}
    alone = [peaky_call(rows, rows + 9, seed=rows, threshold=0.2, **options) for rows in (77, 130)]
    q, k = torch.full((2, 4, 150, 16), math.nan), torch.full((2, 2, 171, 16), math.nan)
    v = k.clone()
    for b, call in enumerate(alone):
        rows, columns = call.tensors["q"].shape[2], call.tensors["k"].shape[2]
        q[b, :, :rows], k[b, :, :columns], v[b, :, :columns] = call.qkv[0][0], call.qkv[1][0], call.qkv[2][0]
    tensors = {"q": q, "k": k, "v": v, "kv_lengths": int32(86, 139), "q_lengths": int32(77, 130),
               "q_start": int32(9, 9)}  # fmt: skip
    out, counts = Call(tensors, options, alone[0].thresholds).run()
    results = [call.run() for call in alone]
    assert torch.equal(counts, results[0][1] + results[1][1]) and counts[:, 0].sum() > 0
    for b, (expected, _) in enumerate(results):
        rows = expected.shape[2]
        assert (out[b, :, :rows] - expected[0]).abs().max() < 1e-6
        assert not out[b, :, rows:].any()


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor, in elements, that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return result


def kernel(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The CPU kernel itself: operations inside a registered op are hidden from modes."""
    names = ("q", "k", "v", "bias", "kv_lengths", "q_start", "q_lengths", "sinks", "threshold_scale")
    options = {key: value for key, value in call.attributes().items() if not key.startswith(("prefill", "decode"))}
    threshold = Thresholds.of(call.thresholds).phase(call.tensors["q"].shape[2])
    return cpu.block_skip_attention_cpu(*(call.tensors.get(n) for n in names), threshold=threshold, **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_no_full_score_matrix(is_causal: bool, threshold: float) -> None:
    rows = 3072
    call = peaky_call(rows, rows, heads=4, kv_heads=2, size=4, v_size=4, br=128, bc=128, threshold=threshold,
                      is_causal=is_causal)  # fmt: skip
    with LargestTensor() as seen:
        kernel(call)
    of_one_tile_row = 4 * 128 * rows
    assert of_one_tile_row // 2 <= seen.largest <= max(cpu._SCORES_AT_ONCE, of_one_tile_row)
    assert seen.largest < rows * rows / 2  # not even of one head


@pytest.mark.parametrize("is_causal", [False, True])
def test_skipped_tiles_cost_no_product_with_v(is_causal: bool) -> None:
    """Floating point operations counted: QK of every tile, PV of the kept ones only."""
    call = peaky_call(256, 256, br=32, bc=32, heads=4, kv_heads=2, size=8, v_size=64, is_causal=is_causal)

    def operations(call: Call) -> tuple[int, int, int]:
        with FlopCounterMode(display=False) as counter:
            _, counts = kernel(call)
        return counter.get_total_flops(), *counts.sum(0).tolist()

    dense, none, total = operations(call.with_threshold(0.0))
    sparse, skipped, _ = operations(call)
    assert none == 0 and skipped > 0.25 * total
    tile = 2 * 32 * 32
    assert dense == total * tile * (8 + 64)
    assert sparse == dense - skipped * tile * 64


@pytest.mark.parametrize("planted", [math.nan, math.inf])
def test_nan_in_v_of_a_skipped_tile_does_not_reach_the_output(planted: float) -> None:
    call = peaky_call(64, 512, br=64, bc=32, heads=2, kv_heads=1, is_causal=True)
    expected, counts = call.run()
    _, tiles = reference.attention(*call.qkv, **call.keywords())
    skipped = [c for c in range(16) if not tiles.kept[0, :, 0, c].any() and tiles.exists[0, :, 0, c].all()]
    assert skipped and counts[0, 0] > 0
    for c in skipped:
        call.tensors["v"][:, :, c * 32 : (c + 1) * 32] = planted
    assert torch.equal(call.run()[0], expected)
    call.tensors["v"][:, :, 3] = planted  # of the first tile, which is kept
    assert not bool(torch.isfinite(call.run()[0]).any())


def test_nan_in_a_visible_score_stays_in_its_row_block() -> None:
    call = peaky_call(96, 256, br=32, bc=32)
    expected, _ = call.run()
    call.tensors["q"][:, :, 40] = math.nan
    out, _ = call.run()
    assert torch.equal(out[:, :, :32], expected[:, :, :32]) and torch.equal(out[:, :, 64:], expected[:, :, 64:])


def test_fully_masked_rows_are_zero() -> None:
    mask = torch.ones(1, 1, 70, 1, dtype=torch.bool)
    mask[:, :, 10:50] = False
    call = peaky_call(70, 128, br=16, bc=32, bias=mask, threshold=0.3)
    out, _ = call.run()
    assert not out[:, :, 10:50].any() and bool(out[:, :, :10].any(-1).all())
    assert_like_reference(call)
    nothing, counts = Call(call.tensors | {"kv_lengths": int32(0)}, call.options, call.thresholds).run()
    assert not nothing.any() and not counts.any()


def test_inputs_need_not_be_contiguous() -> None:
    call = peaky_call(40, 128)
    strided = {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in call.tensors.items()}
    assert not strided["k"].is_contiguous()
    out, _ = Call(strided, call.options, call.thresholds).run()
    assert torch.equal(out, call.run()[0])


def test_inputs_are_left_alone() -> None:
    call = peaky_call(40, 128, is_causal=True, bias=torch.zeros(1, 1, 40, 128))
    before = {name: value.clone() for name, value in call.tensors.items()}
    block_skip_attention(*call.qkv, **call.keywords())
    assert all(torch.equal(value, before[name]) for name, value in call.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_where_heads_keep_different_tiles(dtype: torch.dtype) -> None:
    """The decisions are those of the definition on the same halves, and some heads of a group differ in them."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 96, 16, generator=generator).mul(2).to(dtype) for heads in (6, 2, 2))
    out, counts = block_skip_attention(q, k, v, threshold=0.3, br=8, bc=8, is_causal=True, return_stats=True)
    expected, tiles = reference.attention(q, k, v, threshold=0.3, br=8, bc=8, is_causal=True)
    assert counts.skipped == tuple(tiles.counts[:, 0].tolist()) and len(set(counts.skipped)) > 1
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * v.abs().max()
