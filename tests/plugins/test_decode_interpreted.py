"""The decode kernels' own source, executed by Triton's interpreter behind the C ABI, against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from emulation import Emulation
from planted import THRESHOLD, planted_heads
from torch import Tensor

from sparse_attention.reference import attention

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Absolute, for outputs of magnitude up to 4; the largest error seen was 8e-3 and 1e-3."""


def grouped(*sizes: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return planted_heads(*sizes, device="cpu", **options)


def check(
    emulation: Emulation, q: Any, k: Any, v: Any, *, clean: Any = None, skips: bool = False, **options: Any
) -> Any:
    """Runs the call and compares output, counts and log-sum-exp with the definition; returns the three."""
    out, counts, lse = emulation.run(q, k, v, **options)
    assert all("_decode_" in name for name, _ in emulation.launched)
    options.pop("kv_splits", None)
    if calibrated := options.pop("threshold_factor", 0.0):
        options["threshold"] = {phase: {"a": calibrated, "b": 1.0, "target": 0.0} for phase in ("prefill", "decode")}
    expected, tiles = attention(*(clean or (q, k, v)), **{"threshold": 0.0, **options})
    assert counts.tolist() == tiles.counts.tolist()
    assert not skips or counts[:, 0].sum() > 0, "a test about skipping that skips nothing"
    assert torch.isfinite(out).all()
    assert (out.float() - expected).abs().max() <= TOLERANCE[q.dtype]
    return out, counts, lse


@pytest.mark.parametrize("unit", ["head", "group"])
@pytest.mark.parametrize("lam", [0.0, THRESHOLD])
@pytest.mark.parametrize("columns", [1, 129, 511, 513, 1300])
def test_one_row(emulation: Emulation, columns: int, lam: float, unit: str) -> None:
    q, k, v = grouped(2, 2, 4, 1, columns, 64)
    check(emulation, q, k, v, threshold=lam, unit=unit, skips=lam > 0 and columns > 1000)
    roles = [name.split("_")[-1] for name, _ in emulation.launched]
    assert roles == (["scores", "values", "combine"] if lam else ["scores", "combine"])


def test_heads_of_a_group_keep_different_tiles_or_the_same(emulation: Emulation) -> None:
    q, k, v = grouped(1, 1, 4, 1, 2600, 64)
    own = check(emulation, q, k, v, threshold=THRESHOLD, skips=True)[1]
    joint = check(emulation, q, k, v, threshold=THRESHOLD, unit="group", skips=True)[1]
    assert (own[:, 0] > joint[:, 0]).all() and own[0, 0] != own[1, 0]


@pytest.mark.parametrize("unit", ["head", "group"])
@pytest.mark.parametrize(("group", "rows"), [(1, 16), (4, 3), (3, 5), (2, 16), (20, 1), (7, 7)])
def test_few_rows_and_more_rows_than_lanes(emulation: Emulation, group: int, rows: int, unit: str) -> None:
    """A head's rows decide together; heads that do not fit one program are decided across programs."""
    q, k, v = grouped(1, 2, group, rows, 700, 64, split=1 if rows == 3 else None, dtype=torch.float16)
    check(emulation, q, k, v, threshold=THRESHOLD, unit=unit, is_causal=True, skips=True)
    if unit == "head":
        check(emulation, q, k, v, is_causal=True)


@pytest.mark.parametrize(("size", "value_size"), [(40, 40), (64, 128), (96, 96), (128, 64), (192, 128), (256, 256)])
def test_head_sizes(emulation: Emulation, size: int, value_size: int) -> None:
    q, k, v = grouped(1, 2, 2, 1, 700, size, value_size=value_size)
    for lam in (0.0, THRESHOLD):
        check(emulation, q, k, v, threshold=lam, skips=lam > 0)


@pytest.mark.parametrize("unit", ["head", "group"])
@pytest.mark.parametrize("lam", [0.0, THRESHOLD])
def test_the_number_of_splits_changes_no_bit(emulation: Emulation, lam: float, unit: str) -> None:
    q, k, v = grouped(1, 1, 4, 1, 3200, 64)
    first = check(emulation, q, k, v, threshold=lam, unit=unit, kv_splits=1, skips=lam > 0)
    assert emulation.launched[0][1] == 1
    for splits in (2, 3, 16):
        again = emulation.run(q, k, v, threshold=lam, unit=unit, kv_splits=splits)
        assert emulation.launched[0][1] >= 2
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lam", [0.0, THRESHOLD])
def test_lengths_and_poisoned_padding(emulation: Emulation, rows: int, causal: bool, lam: float) -> None:
    q, k, v = grouped(4, 2, 2, rows, 1100, 64)
    given = {
        "kv_lengths": torch.tensor([1100, 513, 0, 77], dtype=torch.int32),
        "q_start": torch.tensor([1100 - rows, 300, 0, -30], dtype=torch.int32),
        "q_lengths": torch.tensor([rows, max(rows - 1, 1), rows, 0], dtype=torch.int32),
    }
    clean = tuple(t.clone() for t in (q, k, v))
    for b, (keys, queries) in enumerate(zip(given["kv_lengths"].tolist(), given["q_lengths"].tolist(), strict=True)):
        k[b, :, keys:], v[b, :, keys:], q[b, :, queries:] = math.nan, math.inf, math.nan
    out, _, lse = check(
        emulation, q, k, v, clean=clean, threshold=lam, is_causal=causal, skips=lam > 0, kv_splits=2, **given
    )
    for b, queries in enumerate(given["q_lengths"].tolist()):
        assert not out[b, :, queries:].any()
        assert (lse[b, :, queries:] == -math.inf).all()
    assert not out[2].any() and (lse[2] == -math.inf).all()


def test_padding_gives_the_bits_of_the_unpadded_call(emulation: Emulation) -> None:
    q, k, v = grouped(1, 2, 2, 1, 700, 64)
    padded = [torch.nn.functional.pad(t, (0, 0, 0, 1500), value=math.nan) for t in (k, v)]
    lengths = torch.tensor([700], dtype=torch.int32)
    short = emulation.run(q, k, v, threshold=THRESHOLD)
    long = emulation.run(q, *padded, threshold=THRESHOLD, kv_lengths=lengths, q_start=lengths - 1)
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("what", ["window", "softcap", "additive", "boolean", "all"])
def test_general(emulation: Emulation, what: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = grouped(2, 2, 2, rows, 1300, 64, dtype=torch.float16)
    options: dict[str, Any] = {"is_causal": what != "boolean"}
    if what in ("window", "all"):
        options["window"] = 800
    if what in ("softcap", "all"):
        options["softcap"] = 30.0
    if what in ("additive", "all"):
        bias = torch.randn(2, 1, rows, 1300, generator=generator)
        hidden = torch.rand(2, 1, rows, 1300, generator=generator) < 0.2
        hidden[:, :, :, 640:800] = True
        options["bias"] = bias.masked_fill(hidden, torch.finfo(q.dtype).min).to(q.dtype)
    if what == "boolean":
        options["bias"] = torch.rand(1, 4, rows, 1300, generator=generator) < 0.5
        options["bias"][:, :, :, 300:600] = False
    for lam in (0.0, THRESHOLD):
        check(emulation, q, k, v, threshold=lam, skips=lam > 0, **options)


def test_a_nan_in_a_skipped_tile_is_not_seen(emulation: Emulation) -> None:
    q, k, v = grouped(1, 1, 4, 1, 1300, 64)
    tiles = attention(q, k, v, threshold=THRESHOLD)[1]
    kept = tiles.kept[0, :, 0]
    poisoned = int((kept[0] & ~kept[1]).nonzero()[0])  # loaded for head 0 and 2, skipped by heads 1 and 3
    clean = emulation.run(q, k, v, threshold=THRESHOLD)[0]
    v[:, :, poisoned * 128 : poisoned * 128 + 128] = math.nan
    out = emulation.run(q, k, v, threshold=THRESHOLD)[0]
    assert out[0, 0::2].isnan().all()
    assert torch.equal(out[0, 1::2], clean[0, 1::2])


def test_a_nan_in_one_head_stays_there(emulation: Emulation) -> None:
    q, k, v = grouped(1, 1, 4, 1, 700, 64)
    clean = emulation.run(q, k, v, threshold=THRESHOLD)[0]
    q[0, 2] = math.nan
    out = emulation.run(q, k, v, threshold=THRESHOLD)[0]
    assert torch.equal(out[0, [0, 1, 3]], clean[0, [0, 1, 3]])


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0, math.nan, 2000.0])
def test_threshold_from_device_memory(emulation: Emulation, scale: float) -> None:
    q, k, v = grouped(1, 2, 2, 1, 900, 64)
    expected = emulation.run(q, k, v, threshold=THRESHOLD if scale == 1.0 else 0.0)
    again = check(emulation, q, k, v, threshold=THRESHOLD, threshold_scale=torch.tensor([scale]), skips=scale == 1.0)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_calibrated_threshold_follows_the_length(emulation: Emulation) -> None:
    q, k, v = grouped(2, 2, 2, 1, 1000, 64)
    lengths = torch.tensor([1000, 100], dtype=torch.int32)
    check(emulation, q, k, v, threshold_factor=150.0, kv_lengths=lengths, skips=True)  # 1.5 for the second: dense


def test_sinks_and_lse(emulation: Emulation) -> None:
    q, k, v = grouped(1, 2, 2, 1, 700, 64)
    sinks = torch.tensor([0.0, 14.0, -5.0, 200.0], dtype=q.dtype)
    check(emulation, q, k, v, threshold=THRESHOLD, sinks=sinks, skips=True)
    lse = emulation.run(q, k, v)[2]
    scores = (q.float() @ k.float().repeat_interleave(2, 1).transpose(-1, -2)) * 64**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-4)


def test_sequence_major_strides(emulation: Emulation) -> None:
    q, k, v = grouped(2, 2, 2, 2, 600, 64)
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert moved[1].stride() != k.stride()
    assert torch.equal(emulation.run(q, k, v)[0], emulation.run(*moved)[0])


@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 103, 120, 121])
def test_every_generation_has_kernels(emulation: Emulation, architecture: int) -> None:
    q, k, v = grouped(1, 1, 2, 1, 300, 64)
    emulation.driver.emulated_capability(architecture)
    try:
        check(emulation, q, k, v, threshold=THRESHOLD)
        assert {name.split("_")[0] for name, _ in emulation.launched} == {f"sm{architecture // 10 * 10}"}
    finally:
        emulation.driver.emulated_capability(90)


def test_no_keys_at_all(emulation: Emulation) -> None:
    q, k, v = grouped(1, 2, 2, 1, 128, 64)
    out, counts, lse = emulation.run(q, k[:, :, :0], v[:, :, :0])
    assert not out.any() and not counts.any() and (lse == -math.inf).all()
