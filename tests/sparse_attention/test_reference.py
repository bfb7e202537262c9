"""The definition: against a slow independent NumPy version, and every consequence of the rule by itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from sparse_attention import PhaseThreshold, Thresholds, keep_tiles, reference
from tests.attention_calls import Call, calls, int32, peaky_call
from tests.numpy_definition import of_call

BAND = 1e-4  # of ln λ; float32 against float64 on scores below 100
INFINITY = math.inf


def run(call: Call, **changed: Any) -> tuple[Tensor, reference.TileDecisions]:
    return reference.attention(*call.qkv, **(call.keywords() | changed))


@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_against_numpy(call: Call) -> None:
    """Tiles and outputs; where a gap lies within rounding of ln λ, the outputs are compared on the same decisions."""
    expected = of_call(call.plain())
    out, tiles = run(call)
    assert np.array_equal(tiles.exists.numpy(), expected.exists)
    finite = np.isfinite(expected.gap)
    assert np.array_equal(np.isfinite(tiles.gap.numpy()), finite) or call.options.get("unit") == "group"
    with np.errstate(invalid="ignore"):
        near = np.abs(expected.gap - expected.log_threshold.reshape(-1, 1, 1, 1)) < BAND
    differs = tiles.kept.numpy() != expected.kept
    assert not (differs & ~near).any() or (call.options["unit"] == "group" and near.any())
    if not differs.any():
        assert np.abs(out.numpy() - expected.out).max() < 1e-5
        assert np.array_equal(tiles.counts.numpy(), expected.counts)


def test_numpy_examples_skip_tiles() -> None:
    """The comparison above would prove little if its inputs skipped nothing."""
    skipped, total = 0, 0
    for seed in range(10):
        counts = of_call(peaky_call(13, 22, br=3, bc=4, threshold=0.3, seed=seed, size=4, v_size=4).plain()).counts
        skipped, total = skipped + counts[:, 0].sum(), total + counts[:, 1].sum()
    assert 0.2 < skipped / total < 0.8


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_correction_factor_against_numpy(call: Call) -> None:
    options = call.keywords()
    q, k, _ = call.qkv
    lengths = {name: options.get(name) for name in ("kv_lengths", "q_start", "q_lengths")}
    visible = reference.visible_pairs(
        q.shape[0], q.shape[2], k.shape[2], is_causal=options["is_causal"], window=options["window"], **lengths
    )
    scores = reference.attention_scores(
        q, k, visible, scale=options.get("scale", q.shape[-1] ** -0.5), softcap=options["softcap"],
        bias=options.get("bias"),
    )  # fmt: skip
    br = 1 if q.shape[2] == 1 else options["br"]
    least, most = of_call(call.plain()).correction
    assert least <= reference.correction_factor(scores, br, options["bc"]) <= most


def test_correction_factor_of_rising_and_falling_scores() -> None:
    rising = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 4, 8)
    assert reference.correction_factor(rising, 2, 2) == 1.0
    assert reference.correction_factor(-rising, 2, 2) == 0.0
    half = torch.tensor([0.0, 1.0, 0.5, 2.0]).view(1, 1, 1, 4)
    assert reference.correction_factor(half, 1, 1) == pytest.approx(2 / 3)
    assert reference.correction_factor(torch.zeros(1, 1, 1, 1), 1, 1) == 0.0


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_the_first_visible_tile_is_kept(call: Call) -> None:
    """So that no row that sees a key is empty."""
    _, tiles = run(call)
    expected = of_call(call.plain())
    first = np.where(expected.visible.any(-1), expected.visible.argmax(-1) // call.options["bc"], -1)
    br = 1 if first.shape[2] == 1 else call.options["br"]
    seen = 0
    for b, h, i in np.argwhere(first >= 0):
        assert tiles.kept[b, h, i // br, first[b, h, i]]
        seen += 1
    assert seen == expected.visible.any(-1).sum()


def test_zero_is_dense_bit_for_bit() -> None:
    """λ = 0 and a decision that keeps every tile give the same bits, and the tiles it keeps are all that exist."""
    call = peaky_call(70, 90, batch=2, is_causal=True)
    zero, tiles = run(call.with_threshold(0.0))
    assert torch.equal(tiles.kept, tiles.exists)
    sparse, _ = run(call)
    dense, _ = run(call, kept=tiles.exists)
    assert torch.equal(zero, dense) and not torch.equal(zero, sparse)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *call.qkv, attn_mask=torch.ones(70, 90, dtype=torch.bool).tril(20), enable_gqa=True
    )
    assert (zero - expected).abs().max() < 1e-5


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_skipped_tiles_grow_with_the_threshold(call: Call) -> None:
    call.tensors.pop("threshold_scale", None)
    previous = None
    for threshold in (0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999):
        _, tiles = run(call.with_threshold(threshold))
        skipped = tiles.exists & ~tiles.kept
        if previous is not None:
            assert not bool((previous & ~skipped).any())
        previous = skipped


@pytest.mark.parametrize(("finer", "coarser"), [(1, 4), (2, 4), (16, 32), (4, 12)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_finer_rows_skip_a_superset_of_pairs(finer: int, coarser: int, is_causal: bool) -> None:
    call = peaky_call(67, 83, batch=2, bc=8, threshold=0.2, is_causal=is_causal, sharpness=0.4)

    def skipped_pairs(br: int) -> Tensor:
        _, tiles = run(call, br=br)
        skipped = tiles.exists & ~tiles.kept
        pairs = skipped.repeat_interleave(br, 2)[:, :, :67].repeat_interleave(8, 3)[..., :83]
        visible = reference.visible_pairs(2, 67, 83, is_causal=is_causal)
        return pairs & visible

    coarse, fine = skipped_pairs(coarser), skipped_pairs(finer)
    assert coarse.any() and fine.sum() > coarse.sum()
    assert not bool((coarse & ~fine).any())


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_error_bound_against_dense(call: Call) -> None:
    assert_bound(call, run(call)[0])


def test_error_bound_is_met_where_much_is_skipped() -> None:
    call = peaky_call(113, 203, threshold=0.5, sharpness=0.3, is_causal=True)
    counts = run(call)[1].counts
    assert counts[:, 0].sum() > 0.2 * counts[:, 1].sum()
    assert assert_bound(call, run(call)[0]) > 0.01  # it is not a bound on nothing


def assert_bound(call: Call, sparse: Tensor) -> float:
    """`|o_sparse - o_dense| <= 2 max|v| mass`, `mass <= n λ / (1 + n λ)`, row by row; returns the largest error."""
    dense, _ = run(call.with_threshold(0.0))
    _, tiles = run(call)
    options, (q, k, v) = call.keywords(), call.qkv
    rows, columns = q.shape[2], k.shape[2]
    visible = reference.visible_pairs(
        q.shape[0], rows, columns, is_causal=options.get("is_causal", False), window=options.get("window", 0),
        kv_lengths=options.get("kv_lengths"), q_start=options.get("q_start"), q_lengths=options.get("q_lengths"),
    ).expand(-1, q.shape[1], -1, -1)  # fmt: skip
    bias = options.get("bias")
    if bias is not None:
        visible = visible & (bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min / 2)
    br = 1 if rows == 1 else options["br"]
    skipped = (tiles.exists & ~tiles.kept).repeat_interleave(br, 2)[:, :, :rows]
    skipped = skipped.repeat_interleave(options["bc"], 3)[..., :columns] & visible
    lengths = options.get("kv_lengths")
    lengths = torch.full((q.shape[0],), columns) if lengths is None else lengths
    lam = reference.effective_threshold(options["threshold"].phase(rows), lengths, options.get("threshold_scale"))
    weight = skipped.sum(-1) * lam.view(-1, 1, 1)
    largest = v.abs().amax(-1).repeat_interleave(q.shape[1] // k.shape[1], 1).unsqueeze(2)
    largest = torch.where(visible, largest, 0.0).amax(-1)
    error = (sparse - dense).abs().amax(-1)
    assert bool((error <= 2 * largest * weight / (1 + weight) + 1e-5 * (1 + largest)).all())
    return float(error.max())


@pytest.mark.parametrize("more", [{}, {"is_causal": True}, {"is_causal": True, "window": 19}, {"unit": "group"}])
def test_right_padding_changes_nothing(more: dict[str, Any]) -> None:
    """Lengths describe the padding; what lies in it, NaN included, does not matter."""
    short = peaky_call(50, 71, br=8, bc=8, **more)
    q, k, v = short.qkv
    longer = {
        "q": torch.cat([q, torch.full((1, 4, 13, 16), 7.0)], 2),
        "k": torch.cat([k, torch.full((1, 2, 30, 16), math.nan)], 2),
        "v": torch.cat([v, torch.full((1, 2, 30, 16), math.nan)], 2),
        "kv_lengths": int32(71), "q_lengths": int32(50), "q_start": int32(21),
    }  # fmt: skip
    padded = Call(longer, short.options, short.thresholds)
    out, tiles = run(padded)
    expected, alone = run(short)
    assert torch.equal(tiles.counts, alone.counts) and alone.counts[:, 0].sum() > 0
    assert (out[:, :, :50] - expected).abs().max() < 1e-6
    assert not out[:, :, 50:].any()


def test_left_padding_stays_within_the_bound() -> None:
    """Left padding shifts the tiles: decisions may change, the bound holds; at λ = 0 it is the unpadded result."""
    short = peaky_call(51, 51, br=8, bc=8, is_causal=True, threshold=0.3, sharpness=0.5)
    q, k, v = (torch.nn.functional.pad(one, [0, 0, 5, 0]) for one in short.qkv)
    mask = (torch.arange(56) >= 5).view(1, 1, 1, 56)
    padded = Call({"q": q, "k": k, "v": v, "bias": mask}, short.options, short.thresholds)
    dense, _ = run(short.with_threshold(0.0))
    assert (run(padded.with_threshold(0.0))[0][:, :, 5:] - dense).abs().max() < 1e-6
    out, tiles = run(padded)
    assert tiles.counts[:, 0].sum() > 0
    assert not out[:, :, :5].any()
    assert_bound(padded, out)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 1e-6, 0.99])
def test_equality_keeps_the_tile(threshold: float) -> None:
    """Skipped is strictly below: one float32 lower than ln λ is skipped, ln λ itself is kept."""
    at = torch.log(torch.tensor(threshold, dtype=torch.float32))
    below = torch.nextafter(at, torch.tensor(-INFINITY))
    scores = torch.tensor([[0.0, float(at), float(below)]]).view(1, 1, 1, 3)
    assert keep_tiles(scores, threshold, 1, 1).flatten().tolist() == [True, True, False]


def test_rows_beyond_never_vote() -> None:
    """Neither the rows that fill up the last row block, nor those beyond `q_lengths`, nor those that see nothing."""
    scores = torch.tensor([0.0, -10.0]).repeat(3, 1).view(1, 1, 3, 2)
    assert keep_tiles(scores, 0.1, 4, 1).flatten().tolist() == [True, False]
    q, k = torch.ones(1, 1, 4, 1), torch.tensor([0.0, -10.0]).view(1, 1, 2, 1)
    q[:, :, 2:] = 0.0  # these rows would keep both tiles
    _, tiles = reference.attention(q, k, k, threshold=0.1, br=4, bc=1, scale=1.0)
    assert tiles.kept.flatten().tolist() == [True, True]
    _, tiles = reference.attention(q, k, k, threshold=0.1, br=4, bc=1, scale=1.0, q_lengths=int32(2))
    assert tiles.kept.flatten().tolist() == [True, False]
    sees_nothing = torch.tensor([True, True, False, False]).view(1, 1, 4, 1)
    _, tiles = reference.attention(q, k, k, threshold=0.1, br=4, bc=1, scale=1.0, bias=sees_nothing)
    assert tiles.kept.flatten().tolist() == [True, False]


def test_a_row_votes_once_it_has_seen_something() -> None:
    """A row that sees nothing in a tile, but saw something before, does not hold that tile back: its gap is -inf."""
    scores = torch.tensor([[0.0, -INFINITY, -10.0], [0.0, -10.0, -INFINITY]]).view(1, 1, 2, 3)
    assert keep_tiles(scores, 0.1, 2, 1).flatten().tolist() == [True, False, False]
    late = torch.tensor([[-INFINITY, -10.0], [0.0, -10.0]]).view(1, 1, 2, 2)  # row 0 starts in the second tile
    assert keep_tiles(late, 0.1, 2, 1).flatten().tolist() == [True, True]


def test_skipped_tiles_do_not_raise_the_maximum_and_leave_the_denominator() -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, -5.0, -1.0]).view(1, 1, 3, 1)
    v = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    out, tiles = reference.attention(q, k, v, threshold=0.1, br=1, bc=1, scale=1.0)
    assert tiles.kept.flatten().tolist() == [True, False, True]
    assert float(out) == pytest.approx((1 + 3 * math.exp(-1)) / (1 + math.exp(-1)))


def test_sinks_join_the_denominator_only() -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, -5.0]).view(1, 1, 2, 1)
    v, sinks = torch.ones(1, 1, 2, 1), torch.tensor([3.0])
    out, tiles = reference.attention(q, k, v, threshold=0.1, br=1, bc=1, scale=1.0, sinks=sinks)
    assert tiles.kept.flatten().tolist() == [True, False]  # the sink is no score: it neither votes nor raises M
    assert float(out) == pytest.approx(1 / (1 + math.exp(3)))


def test_rows_that_see_nothing_are_zero() -> None:
    call = peaky_call(9, 9, br=4, bc=4, is_causal=True, q_start=int32(-3), sinks=torch.zeros(4))
    out, _ = run(call)
    assert not out[:, :, :3].any() and bool(out[:, :, 3:].any(-1).all())


def test_nan_in_a_visible_score_stays_in_its_row_block() -> None:
    call = peaky_call(32, 64, br=8, bc=8)
    expected, _ = run(call)
    call.tensors["q"][:, :, 11] = math.nan
    out, _ = run(call)
    others = [i for i in range(32) if i // 8 != 1]
    assert torch.equal(out[:, :, others], expected[:, :, others])


@pytest.mark.parametrize("planted", [math.nan, math.inf])
def test_nan_in_v_of_skipped_and_kept_tiles(planted: float) -> None:
    call = peaky_call(16, 64, br=16, bc=8, heads=2, kv_heads=1)
    expected, tiles = run(call)
    skipped = [c for c in range(8) if not tiles.kept[0, :, 0, c].any()]
    kept = [c for c in range(8) if tiles.kept[0, :, 0, c].all()]
    assert skipped and kept
    for c in skipped:
        call.tensors["v"][:, :, c * 8 : (c + 1) * 8] = planted
    assert torch.equal(run(call)[0], expected)
    call.tensors["v"][:, :, kept[-1] * 8] = planted
    assert not bool(torch.isfinite(run(call)[0]).any())


@pytest.mark.parametrize("scale", [10.0, 1e30, math.inf, -1.0, -math.inf, math.nan, 0.0])
def test_a_threshold_out_of_range_at_run_time_is_dense(scale: float) -> None:
    call = peaky_call(40, 72, br=8, bc=8, is_causal=True, threshold=0.1)
    assert run(call)[1].counts[:, 0].sum() > 0
    dense, tiles = run(call.with_threshold(0.0))
    out, found = run(call, threshold_scale=torch.tensor([scale]))
    assert torch.equal(out, dense) and torch.equal(found.kept, tiles.kept)


@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, math.nan, math.inf])
def test_a_threshold_out_of_range_is_dense_for_every_spelling(value: float) -> None:
    assert PhaseThreshold(threshold=value).value(100) == 0.0
    assert float(reference.effective_threshold(PhaseThreshold(threshold=value), torch.tensor([100]))) == 0.0


def test_calibrated_threshold_follows_the_length_of_each_batch_element() -> None:
    curve = PhaseThreshold(a=2.0, b=3.0, target=0.5)
    lam = reference.effective_threshold(curve, torch.tensor([8, 9, 100, 0]))
    expected = [2 * math.exp(1.5) / length for length in (9, 100)]
    assert lam.dtype == torch.float32
    assert lam.tolist() == pytest.approx([0.0, *expected, 0.0])  # 2 e^1.5 / 8 > 1: dense, as with no key at all
    assert [curve.value(length) for length in (8, 9, 100, 0)] == pytest.approx(lam.tolist())


def test_decode_has_its_own_threshold_and_one_row_a_tile() -> None:
    call = peaky_call(1, 40, br=16, bc=8).with_threshold(0.0, decode=0.1)
    _, tiles = run(call)
    assert tiles.kept.shape == (1, 4, 1, 5) and tiles.counts[:, 0].sum() > 0
    two = peaky_call(2, 40, br=16, bc=8).with_threshold(0.0, decode=0.1)
    assert run(two)[1].counts[:, 0].sum() == 0


@pytest.mark.parametrize(
    ("rows", "columns", "br", "bc"),
    [(64, 64, 8, 8), (64, 64, 16, 4), (64, 64, 4, 16), (5, 64, 8, 8), (5, 64, 2, 16), (64, 17, 8, 8),
     (113, 203, 16, 32), (7, 7, 3, 5), (64, 200, 64, 8)],
)  # fmt: skip
def test_counting_of_causal_tiles(rows: int, columns: int, br: int, bc: int) -> None:
    """The lower triangle, aligned at the lower right, whatever the shapes: counted row by row here."""
    call = peaky_call(rows, columns, br=br, bc=bc, is_causal=True, threshold=0.3)
    counts = run(call)[1].counts
    total = sum(
        max(0, math.ceil((min(last, rows) + columns - rows) / bc)) for last in range(br, rows + br, br)
    )  # the last row of a row block sees the most
    assert counts[:, 1].tolist() == [total] * 4
    assert bool((counts[:, 0] <= counts[:, 1]).all()) and bool((counts >= 0).all())
    if total > 8:
        assert counts[:, 0].sum() > 0


def test_group_decides_jointly_and_counts_per_head() -> None:
    call = peaky_call(48, 96, heads=6, kv_heads=2, br=8, bc=8, threshold=0.3, sharpness=0.35, is_causal=True)
    _, alone = run(call)
    _, joint = run(call, unit="group")
    any_of_group = alone.kept.unflatten(1, (2, 3)).any(2, keepdim=True).expand(-1, -1, 3, -1, -1).flatten(1, 2)
    assert torch.equal(joint.kept, any_of_group)
    assert torch.equal(joint.exists, alone.exists)
    assert 0 < joint.counts[:, 0].sum() < alone.counts[:, 0].sum()
    assert joint.counts[:3, 0].unique().numel() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keep_tiles_takes_masks_as_minus_infinity_or_lowest(dtype: torch.dtype) -> None:
    scores = torch.tensor([[0.0, 0.0, -9.0, -9.0, 1.0, 1.0], [0.0, 0.0, -9.0, -9.0, 0.0, 0.0]], dtype=dtype)
    scores = scores.view(1, 1, 2, 6).repeat(2, 3, 1, 1)
    for hidden in (-INFINITY, torch.finfo(dtype).min, torch.finfo(dtype).min * 0.75):
        masked = scores.clone()
        masked[..., 4:] = hidden
        kept = keep_tiles(masked, 0.1, 2, 2)
        assert kept.shape == (2, 3, 1, 3) and kept.dtype == torch.bool
        assert kept[0, 0, 0].tolist() == [True, False, False]
    assert keep_tiles(scores, 0.1, 2, 2)[0, 0, 0].tolist() == [True, False, True]
    assert keep_tiles(scores, 0.0, 2, 2).all()


def test_causality_aligns_where_q_start_says() -> None:
    default = reference.visible_pairs(1, 2, 4, is_causal=True)[0, 0]
    assert default.tolist() == [[True, True, True, False], [True] * 4]
    upper_left = reference.visible_pairs(1, 2, 4, is_causal=True, q_start=int32(0))[0, 0]
    assert upper_left.tolist() == [[True, False, False, False], [True, True, False, False]]
    window = reference.visible_pairs(1, 2, 4, is_causal=True, window=2)[0, 0]
    assert window.tolist() == [[False, True, True, False], [False, False, True, True]]


def test_visible_by_bias_is_tested_before_adding() -> None:
    """A bias just above half the lowest number is a very small score, and still visible."""
    lowest = torch.finfo(torch.float32).min
    q, k, v = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 2, 1), torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    bias = torch.tensor([lowest / 2, lowest * 0.49]).view(1, 1, 1, 2)
    out, tiles = reference.attention(q, k, v, threshold=0.0, bc=1, bias=bias)
    assert tiles.exists.flatten().tolist() == [False, True] and float(out) == 2.0


def test_thresholds_round_trip_through_attributes() -> None:
    thresholds = Thresholds(PhaseThreshold(threshold=0.2), PhaseThreshold(a=3.0, b=1.5, target=0.4))
    assert Thresholds.from_attributes(thresholds.attributes()) == thresholds
