"""The compiled decode kernels against the definition, on any GPU they were built for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu_checks import check, define, run
from planted import THRESHOLD, planted_heads
from torch import Tensor

from sparse_attention import native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0) or native.find_library() is None,
        reason=f"needs a GPU of compute capability 8.0 or later and the kernel library ({native.BUILD_COMMAND})",
    ),
]
BOTH = (torch.float16, torch.bfloat16)
UNITS = ("head", "group")
COLUMNS = (1, 127, 129, 511, 512, 513, 4097, 32768)


def one_head_each(columns: int) -> tuple[Tensor, Tensor, Tensor]:
    return planted_heads(1, 2, 4, 1, columns, 128)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("unit", UNITS)
def test_one_row(dtype: torch.dtype, size: int, unit: str) -> None:
    for columns in COLUMNS:
        q, k, v = planted_heads(3, 2, 4, 1, columns, size, dtype=dtype)
        check(q, k, v, unit=unit)
        check(q, k, v, unit=unit, threshold=THRESHOLD, must_skip=columns >= 4097)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("group", "rows"), [(1, 1), (8, 1), (16, 1), (20, 1), (1, 16), (4, 3), (3, 5), (2, 16), (7, 7)]
)
def test_few_rows_and_more_rows_than_lanes(dtype: torch.dtype, group: int, rows: int, unit: str) -> None:
    q, k, v = planted_heads(2, 3, group, rows, 5000, 128, dtype=dtype, split=1 if rows == 3 else None)
    for causal in (False, True):
        check(q, k, v, is_causal=causal, unit=unit)
        check(q, k, v, is_causal=causal, unit=unit, threshold=THRESHOLD, must_skip=True)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("lam", [0.0, THRESHOLD])
def test_the_number_of_splits_changes_no_bit(size: int, lam: float, unit: str) -> None:
    q, k, v = planted_heads(2, 2, 4, 1, 20000, size)
    first = run(q, k, v, threshold=lam, unit=unit, kv_splits=1)
    assert (first[1][:, 0] > 0).all() == (lam > 0)
    for splits in (0, 2, 3, 16, 40):
        again = run(q, k, v, threshold=lam, unit=unit, kv_splits=splits)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), splits


def test_heads_of_a_group_keep_different_tiles_or_the_same() -> None:
    q, k, v = one_head_each(16384)
    own, joint = (run(q, k, v, threshold=THRESHOLD, unit=unit)[1] for unit in UNITS)
    assert (own[:, 0] > joint[:, 0]).all() and (joint[:, 0] > 0).all()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lam", [0.0, THRESHOLD])
def test_lengths_and_poisoned_padding(rows: int, causal: bool, lam: float) -> None:
    q, k, v = planted_heads(4, 2, 4, rows, 8000, 128)
    lengths = {
        "kv_lengths": [8000, 513, 0, 77], "q_start": [8000 - rows, 300, 0, -30],
        "q_lengths": [rows, max(rows - 1, 1), rows, 0],
    }  # fmt: skip
    given = {name: torch.tensor(value, dtype=torch.int32, device="cuda") for name, value in lengths.items()}
    for b, (keys, queries) in enumerate(zip(lengths["kv_lengths"], lengths["q_lengths"], strict=True)):
        k[b, :, keys:], v[b, :, keys:], q[b, :, queries:] = math.nan, math.inf, math.nan
    clean = q.nan_to_num(0.0), k.nan_to_num(0.0), v.nan_to_num(0.0, 0.0, 0.0)
    expected, tiles, bound = define(*clean, threshold=lam, is_causal=causal, **given)
    out, counts, lse = run(q, k, v, threshold=lam, is_causal=causal, **given)
    assert counts.tolist() == tiles.counts.tolist()
    assert lam == 0 or counts[:, 0].sum() > 0
    assert (out.float() - expected).abs().max() <= 2 * bound + 1e-5
    for b, queries in enumerate(lengths["q_lengths"]):
        assert not out[b, :, queries:].any() and (lse[b, :, queries:] == -math.inf).all()
    assert not out[2].any() and (lse[2] == -math.inf).all()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("what", ["window", "softcap", "additive", "boolean", "all"])
def test_general(what: str, size: int, rows: int) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = planted_heads(2, 2, 4, rows, 5000, size)
    options: dict[str, Any] = {"is_causal": what != "boolean"}
    if what in ("window", "all"):
        options["window"] = 3000
    if what in ("softcap", "all"):
        options["softcap"] = 30.0
    if what in ("additive", "all"):
        bias = torch.randn(2, 1, rows, 5000, device="cuda", generator=generator)
        hidden = torch.rand(2, 1, rows, 5000, device="cuda", generator=generator) < 0.2
        hidden[:, :, :, 2560:3400] = True
        options["bias"] = bias.masked_fill(hidden, torch.finfo(q.dtype).min).to(q.dtype)
    if what == "boolean":
        options["bias"] = torch.rand(1, 8, rows, 5000, device="cuda", generator=generator) < 0.5
        options["bias"][:, :, :, 300:600] = False
    for lam in (0.0, THRESHOLD):
        check(q, k, v, threshold=lam, **options, must_skip=lam > 0 and what in ("window", "softcap", "boolean"))


def test_nan_in_a_tile_one_head_skips() -> None:
    q, k, v = one_head_each(8000)
    kept = define(q, k, v, threshold=THRESHOLD)[1].kept[0, :4, 0]
    poisoned = int((kept[0] & ~kept[1]).nonzero()[0])  # loaded for heads 0 and 2, skipped by heads 1 and 3
    clean = run(q, k, v, threshold=THRESHOLD)[0]
    v[:, 0, poisoned * 128 : poisoned * 128 + 128] = math.nan
    out = run(q, k, v, threshold=THRESHOLD)[0]
    assert out[0, 0:4:2].isnan().all()
    assert torch.equal(out[0, 1:4:2], clean[0, 1:4:2]) and torch.equal(out[0, 4:], clean[0, 4:])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_zero_threshold_is_dense_and_repeats_agree(size: int, unit: str) -> None:
    q, k, v = planted_heads(2, 2, 4, 1, 9000, size)
    zero, one = (torch.tensor([x], device="cuda") for x in (0.0, 1.0))
    dense = run(q, k, v)[0]
    assert torch.equal(dense, run(q, k, v, unit=unit, threshold=THRESHOLD, threshold_scale=zero)[0])
    first, counts, _ = run(q, k, v, unit=unit, threshold=THRESHOLD)
    assert (counts[:, 0] > 0).all()
    assert torch.equal(first, run(q, k, v, unit=unit, threshold=THRESHOLD, threshold_scale=one)[0])
    for _ in range(20):
        again, counts_again, _ = run(q, k, v, unit=unit, threshold=THRESHOLD)
        assert torch.equal(first, again) and torch.equal(counts, counts_again)


def test_calibrated_threshold_mixes_dense_and_skipping_entries() -> None:
    q, k, v = planted_heads(2, 2, 4, 1, 4096, 128)
    lengths = torch.tensor([4096, 200], dtype=torch.int32, device="cuda")
    out, counts, _ = run(q, k, v, threshold_factor=300.0, kv_lengths=lengths)
    threshold = {"decode": {"a": 300.0, "b": 1.0, "target": 0.0}}
    expected, tiles, bound = define(q, k, v, threshold=threshold, kv_lengths=lengths)  # type: ignore[arg-type]
    assert counts.tolist() == tiles.counts.tolist()
    assert counts[:, 0].sum() > 0
    assert (out.float() - expected).abs().max() <= 2 * bound + 1e-5


def test_sinks_lse_and_value_head_size() -> None:
    q, k, v = planted_heads(1, 2, 2, 1, 3000, 128, value_size=64)
    sinks = torch.tensor([0.0, 14.0, -5.0, 200.0], dtype=q.dtype, device="cuda")
    check(q, k, v, threshold=THRESHOLD, sinks=sinks, must_skip=True)
    lse = run(q, k, v)[2]
    scores = (q.float() @ k.float().repeat_interleave(2, 1).transpose(-1, -2)) * 128**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-4)


def test_sequence_major_strides_need_no_copy() -> None:
    q, k, v = planted_heads(2, 2, 4, 2, 3000, 128)
    q2, k2, v2 = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    assert k2.stride() != k.stride()
    assert torch.equal(run(q, k, v, threshold=THRESHOLD)[0], run(q2, k2, v2, threshold=THRESHOLD)[0])


def test_tensors_of_more_than_two_to_the_31_elements() -> None:
    heads, columns = 130, 131072
    q = torch.randn(1, heads, 1, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, heads, columns, 128, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    v = torch.randn(1, heads, columns, 128, device="cuda", dtype=torch.bfloat16)
    for lam in (0.0, 1e-30):  # the second takes the other kernels and skips nothing
        out = run(q, k, v, threshold=lam)[0]
        expected, _, bound = define(q[:, -1:], k[:, -1:], v[:, -1:])
        assert (out[:, -1:].float() - expected).abs().max() <= 2 * bound + 1e-5


def test_graph_capture_and_the_op() -> None:
    import sparse_attention

    q, k, v = one_head_each(4096)
    length = torch.tensor([3000], dtype=torch.int32, device="cuda")

    def attend() -> Tensor:
        return sparse_attention.block_skip_attention(q, k, v, threshold=THRESHOLD, kv_lengths=length, unit="group")

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for keys in (3000, 1, 4096):  # the length is read when the graph runs
        length.fill_(keys)
        graph.replay()
        assert torch.equal(captured, attend())
