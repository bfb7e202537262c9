"""The prefill kernels' own source, executed over an emulated driver, against the definition.

Hopper's run over an emulated SM, the portable ones in Triton's interpreter. Everything between the C ABI and the
products is the real thing: the choice of kernel, tensor maps, argument list, schedule, barriers, masks, votes, counts.
What is not: layouts, registers, the compiler, time.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from emulated_checks import check, inputs
from emulation import Emulation
from planted import THRESHOLD, WIDE_KERNELS, below_zero, log_sum_of_kept, rising

from sparse_attention.reference import attention

RAGGED = [(1, 129), (17, 17), (200, 64), (113, 203), (200, 520)]
"""Query rows and keys; up to 16 rows are the decode kernels' affair."""


@pytest.mark.parametrize(
    ("prefill", "size"),
    [("hopper", 64), ("hopper", 128), ("hopper", 256), ("portable", 64)],
    indirect=["prefill"],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("br", "lam"), [(64, 0.0), (64, THRESHOLD), (128, THRESHOLD)])
def test_ragged(prefill: Emulation, size: int, causal: bool, br: int, lam: float) -> None:
    for rows, columns in RAGGED:
        q, k, v = inputs(1, 2, 1, rows, columns, size, seed=5)  # with which something is skipped at every size and br
        counts = check(prefill, q, k, v, threshold=lam, br=br, is_causal=causal)[1]
        if columns == 520 and lam:
            assert counts[:, 0].sum() > 0
        if rows <= 16:
            assert {name.split("_")[3] for name, _ in prefill.launched} == {"decode"}
            continue
        (kernel, _), *others = prefill.launched
        assert not others
        assert kernel.startswith("sm80") or ("dense" in kernel) == (lam == 0)


@pytest.mark.parametrize("br", [64, 128])
@pytest.mark.parametrize(
    ("prefill", "causal", "tiles"),
    [("hopper", True, 60), ("portable", True, 60), ("hopper", False, 140)],
    indirect=["prefill"],
)
def test_long_runs_of_skipped_tiles(prefill: Emulation, br: int, causal: bool, tiles: int) -> None:
    """Hopper's kernels of head size 128 then load V only of tiles that are kept, and later early again."""
    q, k, v = inputs(1, 1, 1, 130, tiles * 128, 128, keep=0.0, split=0)
    late = tiles - 10
    k[:, :, late * 128 :] = inputs(1, 1, 1, 130, 10 * 128, 128, keep=1.0, split=0)[1]
    k[:, :, 40 * 128 : 41 * 128] = k[:, :, :128]  # kept, within the run
    counts = check(prefill, q, k, v, threshold=THRESHOLD, br=br, is_causal=causal)[1]
    skipped, exist = counts.sum(0).tolist()
    assert 0.7 < skipped / exist < 0.95


@pytest.mark.parametrize(("size", "br"), WIDE_KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_for_many_rows(many_rows: Emulation, emulation: Emulation, size: int, br: int, causal: bool) -> None:
    """The same bits in another order of events, and as the kernels for few rows where a warp has the same rows."""
    for rows, columns in [(113, 203), (200, 64), (450, 900)]:
        q, k, v = inputs(1, 2, 1, rows, columns, size, seed=5)
        options: dict[str, Any] = {"threshold": THRESHOLD, "br": br, "is_causal": causal}
        result = check(many_rows, q, k, v, **options)
        assert "_wide_" in many_rows.launched[0][0]
        assert columns < 900 or (result[1][:, 0] > 0).all()
        log_sum = log_sum_of_kept(q, k, attention(q, k, v, **options)[1].kept, br, causal)
        # what is summed is P as it is multiplied, rounded
        torch.testing.assert_close(result[2], log_sum, rtol=0.0, atol=torch.finfo(q.dtype).eps / 2 + 1e-4)
        for other, seed in ((many_rows, 1), *([(emulation, 0)] if br == 64 else [])):
            again = other.run(q, k, v, seed=seed, **options)
            assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))


@pytest.mark.parametrize(("size", "br"), WIDE_KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_in_kernels_for_many_rows(many_rows: Emulation, size: int, br: int, causal: bool) -> None:
    q, k, v = inputs(4, 2, 1, 200, 400, size, keep=0.2)
    lengths = {"kv_lengths": [400, 257, 0, 77], "q_lengths": [200, 65, 100, 0], "q_start": [200, 192, 0, -30]}
    options = {name: torch.tensor(values, dtype=torch.int32) for name, values in lengths.items()}
    clean = q.clone(), k.clone(), v.clone()
    for b, (keys, rows) in enumerate(zip(lengths["kv_lengths"], lengths["q_lengths"], strict=True)):
        k[b, :, keys:], v[b, :, keys:], q[b, :, rows:] = float("nan"), float("inf"), float("nan")
    _, counts, lse = check(many_rows, q, k, v, clean=clean, threshold=THRESHOLD, br=br, is_causal=causal, **options)
    assert int(counts[:, 0].sum()) > 0
    assert "_wide_" in many_rows.launched[0][0]
    for b, valid in enumerate(lengths["q_lengths"]):
        assert (lse[b, :, valid:] == -math.inf).all()


@pytest.mark.parametrize("size", [64, 128])
def test_lengths_that_end_before_items_overlap(many_rows: Emulation, size: int) -> None:
    """256 rows are two items of two blocks each, but one of three where `q_lengths` end an entry in it."""
    q_lengths = [128, 129, 192, 193, 256]
    q, k, v = inputs(5, 2, 1, 256, 400, size, keep=0.2)
    clean = q.clone(), k, v
    for b, valid in enumerate(q_lengths):
        q[b, :, valid:] = float("nan")
    lengths = torch.tensor(q_lengths, dtype=torch.int32)
    counts, lse = check(many_rows, q, k, v, clean=clean, threshold=THRESHOLD, br=64, q_lengths=lengths)[1:]
    assert int(counts[:, 0].sum()) > 0
    assert "_wide_" in many_rows.launched[0][0]
    for b, valid in enumerate(q_lengths):
        assert torch.isfinite(lse[b, :, :valid]).all() and (lse[b, :, valid:] == -math.inf).all()


@pytest.mark.parametrize(("size", "br"), WIDE_KERNELS)
def test_random_calls_in_kernels_for_many_rows(many_rows: Emulation, size: int, br: int) -> None:
    """Warpgroups of one item that see different numbers of its tiles, or nothing, in random orders of events."""
    draw = random.Random(size + br)
    skipped = 0
    for seed in range(6):
        rows, columns = draw.randint(17, 420), draw.randint(1, 700)
        q, k, v = inputs(2, 2, 1, rows, columns, size, keep=draw.choice([0.05, 0.5]), seed=seed)
        bounds = {"kv_lengths": (0, columns), "q_lengths": (0, rows), "q_start": (-rows, columns)}
        lengths = {name: [draw.randint(*bound) for _ in range(2)] for name, bound in bounds.items()}
        options: dict[str, Any] = {name: torch.tensor(values, dtype=torch.int32) for name, values in lengths.items()}
        clean = q.clone(), k.clone(), v.clone()
        for b, (keys, valid) in enumerate(zip(lengths["kv_lengths"], lengths["q_lengths"], strict=True)):
            k[b, :, keys:], v[b, :, keys:], q[b, :, valid:] = float("nan"), float("inf"), float("nan")
        options |= {"threshold": THRESHOLD, "br": br, "is_causal": seed % 3 > 0}
        skipped += int(check(many_rows, q, k, v, clean=clean, seed=seed, **options)[1][:, 0].sum())
        assert "_wide_" in many_rows.launched[0][0]
    assert skipped > 0


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("lam", [0.0, THRESHOLD])
def test_maxima_that_rise_in_every_tile(prefill: Emulation, size: int, lam: float) -> None:
    """By a factor 2 ** 17: relative to the tile before, exponentials have no value in float16."""
    check(prefill, *rising(1, 2, 150, 520, size, dtype=torch.float16, device="cpu"), threshold=lam, br=64)


@pytest.mark.parametrize("prefill", ["hopper"], indirect=True)
@pytest.mark.parametrize(("size", "every"), [(64, 2), (128, 1), (128, 2), (256, 2)])
def test_negative_scores(prefill: Emulation, size: int, every: int) -> None:
    """Scores are compared as integers, whose order is the reverse of that of negative numbers."""
    q, k, v = inputs(1, 2, 1, 200, 520, size, seed=5)
    q, k = below_zero(q, k, every)
    assert (q.float() @ k.float().transpose(-1, -2))[:, :, ::every].max() < 0
    counts = check(prefill, q, k, v, threshold=THRESHOLD, br=64, is_causal=True)[1]
    assert (counts[:, 0] > 0).all()


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("lam", [0.0, THRESHOLD])
@pytest.mark.parametrize("rise", [0.0, 4.0])
def test_a_first_tile_of_minus_infinity(prefill: Emulation, size: int, lam: float, rise: float) -> None:
    """Nothing has been seen after it, so the next tile's exponents must not be relative to something it left behind."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, size, generator=generator) for n in (150, 520, 520))
    q[..., 0] = 1.0
    k[:, :, :128, 0] = -math.inf
    k[:, :, 384:, 0] += rise * math.sqrt(size)
    q, k, v = q.half(), k.half(), v.half()
    out, _, lse = prefill.run(q, k, v, threshold=lam, br=64)
    scores = (q.float() @ k.float().mT) / math.sqrt(size)
    assert (lse - torch.logsumexp(scores, -1)).abs().max() < 1e-2
    assert (out.float() - scores.softmax(-1) @ v.float()).abs().max() < 2e-2


@pytest.mark.parametrize(
    ("prefill", "br", "what"),
    [
        *(("hopper", br, what) for br in (64, 128) for what in ("window", "softcap", "additive", "boolean", "all")),
        *(("portable", 64, what) for what in ("boolean", "all")),
    ],
    indirect=["prefill"],
)
def test_general(prefill: Emulation, what: str, br: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = inputs(2, 2, 1, 200, 420, 64, dtype=torch.float16)
    options: dict[str, Any] = {"is_causal": what != "boolean"}
    if what in ("window", "all"):
        options["window"] = 150
    if what in ("softcap", "all"):
        options["softcap"] = 30.0
    if what in ("additive", "all"):
        bias = torch.randn(2, 1, 200, 420, generator=generator)
        hidden = torch.rand(2, 1, 200, 420, generator=generator) < 0.2
        hidden[:, :, :, 128:260] = True
        options["bias"] = bias.masked_fill(hidden, torch.finfo(q.dtype).min).to(q.dtype)
    if what == "boolean":
        options["bias"] = torch.rand(1, 2, 200, 420, generator=generator) < 0.5
        options["bias"][:, :, :, 100:260] = False
        options["bias"][:, :, 64:128] = False
    for lam in (0.0, THRESHOLD):
        check(prefill, q, k, v, threshold=lam, br=br, **options)
    assert "general" in prefill.launched[0][0]


@pytest.mark.parametrize(("prefill", "size"), [("hopper", 64), ("hopper", 128), ("portable", 64)], indirect=["prefill"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lam", [0.0, THRESHOLD])
@pytest.mark.parametrize("softcap", [0.0, 60.0])
def test_lengths_and_poisoned_padding(prefill: Emulation, size: int, causal: bool, lam: float, softcap: float) -> None:
    q, k, v = inputs(4, 2, 1, 200, 400, size)
    lengths = {"kv_lengths": [400, 257, 0, 77], "q_lengths": [200, 65, 100, 0], "q_start": [200, 192, 0, -30]}
    given = {name: torch.tensor(values, dtype=torch.int32) for name, values in lengths.items()}
    clean = tuple(t.clone() for t in (q, k, v))
    for b in range(4):
        k[b, :, lengths["kv_lengths"][b] :] = float("nan")
        v[b, :, lengths["kv_lengths"][b] :] = float("inf")
        q[b, :, lengths["q_lengths"][b] :] = float("nan")
    out, _, lse = check(prefill, q, k, v, clean=clean, threshold=lam, is_causal=causal, softcap=softcap, **given)
    for b in range(4):
        assert not out[b, :, lengths["q_lengths"][b] :].any()
        assert (lse[b, :, lengths["q_lengths"][b] :] == -math.inf).all()


@pytest.mark.parametrize(
    ("prefill", "size", "causal"),
    [*(("hopper", size, causal) for size in (64, 128, 256) for causal in (False, True)), ("portable", 64, True)],
    indirect=["prefill"],
)  # fmt: skip
def test_threshold_from_device_memory(prefill: Emulation, size: int, causal: bool) -> None:
    """λ = 0 at run time gives the dense kernel's bits; of Hopper's two kernels enqueued one finds nothing to do."""
    q, k, v = inputs(2, 2, 1, 200, 400, size)
    dense = prefill.run(q, k, v, is_causal=causal)[0]
    skipping = prefill.run(q, k, v, is_causal=causal, threshold=THRESHOLD)[0]
    assert not torch.equal(dense, skipping)
    for scale, expected in ((0.0, dense), (1.0, skipping), (-1.0, dense), (math.nan, dense), (2000.0, dense)):
        out, counts, _ = check(prefill, q, k, v, is_causal=causal, threshold=THRESHOLD,
                               threshold_scale=torch.tensor([scale]))  # fmt: skip
        assert torch.equal(out, expected)
        assert (counts[:, 0] > 0).all() == (expected is skipping)
        assert len(prefill.launched) == (1 if "sm80" in prefill.launched[0][0] else 2)


def test_calibrated_threshold_follows_the_length(prefill: Emulation) -> None:
    q, k, v = inputs(2, 2, 2, 200, 1000, 128)
    lengths = torch.tensor([1000, 100], dtype=torch.int32)
    counts = check(prefill, q, k, v, threshold_factor=150.0, kv_lengths=lengths)[1]
    assert counts[:, 0].sum() > 0  # of the first entry alone: the second's λ is 1.5, which is dense


def test_sinks_and_lse(prefill: Emulation) -> None:
    q, k, v = inputs(1, 4, 4, 100, 300, 128)
    sinks = torch.tensor([0.0, 14.0, -5.0, 20.0], dtype=q.dtype)
    check(prefill, q, k, v, threshold=THRESHOLD, sinks=sinks, is_causal=True)
    lse = prefill.run(q, k, v)[2]
    scores = (q.float() @ k.float().transpose(-1, -2)) * 128**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-4)


def test_sequence_major_strides(prefill: Emulation) -> None:
    q, k, v = inputs(2, 4, 2, 100, 200, 128)
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(prefill.run(q, k, v)[0], prefill.run(*moved)[0])


@pytest.mark.parametrize(("size", "value_size"), [(40, 40), (96, 96), (128, 64), (192, 128)])
def test_head_sizes_between(prefill: Emulation, size: int, value_size: int) -> None:
    q, k, v = inputs(1, 2, 2, 100, 300, size, value_size=value_size, keep=0.2, seed=5)
    counts = check(prefill, q, k, v, threshold=THRESHOLD, is_causal=True)[1]
    assert counts[:, 0].sum() > 0


def test_no_keys_at_all(prefill: Emulation) -> None:
    q, k, v = inputs(1, 2, 2, 100, 128, 64)
    out, counts, _ = prefill.run(q, k[:, :, :0], v[:, :, :0])
    assert not out.any() and not counts.any()


def test_values_of_skipped_tiles_are_not_read(prefill: Emulation) -> None:
    q, k, v = inputs(1, 2, 2, 128, 900, 64, split=0)
    options: dict[str, Any] = {"threshold": THRESHOLD, "br": 128}
    clean, counts, _ = check(prefill, q, k, v, **options)
    _, tiles = attention(q, k, v, **options)
    skipped = (tiles.exists & ~tiles.kept)[0, :, 0].repeat_interleave(128, -1)[:, :900]
    assert skipped.any(-1).all() and counts[:, 0].sum() > 0
    poisoned = v.masked_fill(skipped[None, :, :, None], float("nan"))
    assert torch.equal(prefill.run(q, k, poisoned, **options)[0], clean)
