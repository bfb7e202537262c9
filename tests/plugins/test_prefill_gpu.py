"""The compiled prefill kernels against the definition, on a GPU.

On an H100 or H200 every check runs for Hopper's kernels and, with a library built with -DBSA_PORTABLE_ON_HOPPER=ON, for
the portable ones, whose PTX is the same on every architecture. Elsewhere only the portable ones exist.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu_checks import check, define, run
from planted import THRESHOLD, WIDE_CALLS, WIDE_KERNELS, below_zero, log_sum_of_kept, planted, rising
from torch import Tensor

from sparse_attention import native

HOPPER = (9, 0)
FAMILY = "BSA_FAMILY"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("family"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0) or native.find_library() is None,
        reason=f"needs a GPU of compute capability 8.0 or later and the kernel library ({native.BUILD_COMMAND})",
    ),
]
RAGGED = [(1, 1), (1, 129), (113, 203), (511, 511), (128, 512), (4097, 4097), (300, 64)]
BOTH = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["hopper", "portable"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels run the test's calls of more than 16 query rows."""
    on_hopper = torch.cuda.get_device_capability() == HOPPER
    if request.param == "hopper" and not on_hopper:
        pytest.skip("Hopper's kernels need an H100 or H200")
    if request.param == "portable" and on_hopper:
        monkeypatch.setenv(FAMILY, "portable")
    q = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device="cuda")
    has_work_counter = native.load_library().workspace_size(native.pack(q, q, q, q)) > 0
    if has_work_counter != (request.param == "hopper"):
        pytest.skip("the library was built without these kernels (-DBSA_KERNELS=..., -DBSA_PORTABLE_ON_HOPPER=ON)")
    return str(request.param)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_dense(dtype: torch.dtype, size: int, causal: bool) -> None:
    for rows, columns in RAGGED:
        q, k, v = planted(1, 2, 2, rows, columns, size, dtype=dtype)
        check(q, k, v, is_causal=causal)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("step", [12.0, 100.0])
def test_maxima_that_rise_in_every_tile(dtype: torch.dtype, size: int, causal: bool, step: float) -> None:
    """Relative to the tile before, exponentials have no value in float16 (2 ** 17) or even in float32 (2 ** 144)."""
    check(*rising(1, 4, 700, 1500, size, step=step, dtype=dtype), is_causal=causal)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("br", [64, 128])
def test_skip(dtype: torch.dtype, size: int, causal: bool, br: int) -> None:
    for rows, columns in [*RAGGED, (2048, 2048), (1000, 3000)]:
        q, k, v = planted(2, 4, 2, rows, columns, size, dtype=dtype)
        check(q, k, v, is_causal=causal, threshold=THRESHOLD, br=br, must_skip=columns >= 511)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize(("size", "br"), WIDE_KERNELS)
def test_calls_with_many_rows(dtype: torch.dtype, causal: bool, lengths: bool, size: int, br: int) -> None:
    for rows, columns in WIDE_CALLS:
        q, k, v = planted(4, 32, 4, rows, columns, size, dtype=dtype)
        options: dict[str, Any] = {"is_causal": causal}
        if lengths:
            entries = [columns, columns // 2, 0, 1]
            options["kv_lengths"] = torch.tensor(entries, dtype=torch.int32, device="cuda")
        check(q, k, v, threshold=THRESHOLD, br=br, must_skip=columns >= 511 and not lengths, **options)
        if br == 64:  # a warp has the same rows in the kernel for few, and computes the same bits
            many = run(q, k, v, threshold=THRESHOLD, br=br, **options)[0]
            if lengths:
                options["kv_lengths"] = options["kv_lengths"][:1]
            few = run(q[:1, :1], k[:1, :1], v[:1, :1], threshold=THRESHOLD, br=br, **options)[0]
            assert torch.equal(few, many[:1, :1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("size", "br"), WIDE_KERNELS)
def test_lengths_in_calls_with_many_rows(causal: bool, size: int, br: int) -> None:
    """1024 rows are items that overlap, but where `q_lengths` end an entry before."""
    q, k, v = planted(4, 32, 4, 1024, 400, size)
    q_lengths = torch.tensor([1024, 961, 960, 200], dtype=torch.int32, device="cuda")
    clean = q.clone(), k, v
    for b, rows in enumerate(q_lengths.tolist()):
        q[b, :, rows:] = float("nan")
    options: dict[str, Any] = {"threshold": THRESHOLD, "br": br, "is_causal": causal, "q_lengths": q_lengths}
    expected, tiles, bound = define(*clean, **options)
    out, counts, lse = run(q, k, v, **options)
    assert counts.tolist() == tiles.counts.tolist() and int(counts[:, 0].sum()) > 0
    assert (out.float() - expected).abs().max() <= 2 * bound + 1e-5
    for b, rows in enumerate(q_lengths.tolist()):
        assert not out[b, :, rows:].any()
        assert (lse[b, :, rows:] == -math.inf).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "br"), [(8, 64), (12, 64), (8, 128)])
@pytest.mark.parametrize("keep", [0.02, 0.1])
def test_long_runs_of_skipped_tiles(causal: bool, heads: int, br: int, keep: float) -> None:
    """At head size 128 (not causal: beyond 16384 keys) V is then loaded of kept tiles only; at 0.1 to and fro.

    12 heads of 2000 rows are more blocks of 128 rows than an H100 has multiprocessors: the kernel for many rows.
    """
    q, k, v = planted(1, heads, 4, 2000, 17000, 128, keep=keep)
    skipped, exist = run(q, k, v, threshold=THRESHOLD, br=br, is_causal=causal)[1].sum(0).tolist()
    assert skipped > 0.5 * exist
    check(q, k, v, threshold=THRESHOLD, br=br, is_causal=causal)


@pytest.mark.parametrize("br", [64, 128])
def test_half_of_the_rows_want_what_the_others_skip(br: int) -> None:
    q, k, v = planted(1, 1, 1, 1024, 2048, 128, keep=0.3)
    fine = run(q, k, v, threshold=THRESHOLD, br=64)[1]
    coarse = run(q, k, v, threshold=THRESHOLD, br=128)[1]
    share = [float(c[0, 0] / c[0, 1]) for c in (fine, coarse)]
    assert share[0] > share[1] > 0.1
    check(q, k, v, threshold=THRESHOLD, br=br, must_skip=True)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("br", [64, 128])
@pytest.mark.parametrize("every", [1, 2])
def test_negative_scores(size: int, br: int, every: int) -> None:
    """Hopper's kernels compare scores as integers, whose order is the reverse of that of negative numbers."""
    for heads, rows in ((2, 300), (132, 700)):
        q, k, v = planted(1, heads, heads, rows, 900, size)
        q, k = below_zero(q, k, every)
        for causal in (False, True):
            check(q, k, v, threshold=THRESHOLD, br=br, is_causal=causal, must_skip=True)
            check(q, k, v, threshold=THRESHOLD, br=br, is_causal=causal, softcap=100.0, must_skip=True)
        check(q, k, v)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lam", [0.0, THRESHOLD])
@pytest.mark.parametrize("general", [False, True])
def test_lengths_and_poisoned_padding(size: int, causal: bool, lam: float, general: bool) -> None:
    q, k, v = planted(4, 4, 2, 700, 1100, size)
    kv_lengths = torch.tensor([1100, 513, 0, 77], dtype=torch.int32, device="cuda")
    q_lengths = torch.tensor([700, 65, 300, 0], dtype=torch.int32, device="cuda")
    q_start = torch.tensor([400, 448, 0, -30], dtype=torch.int32, device="cuda")
    for b, (keys, rows) in enumerate(zip(kv_lengths.tolist(), q_lengths.tolist(), strict=True)):
        k[b, :, keys:], v[b, :, keys:], q[b, :, rows:] = float("nan"), float("inf"), float("nan")
    clean = q.nan_to_num(0.0), k.nan_to_num(0.0), v.nan_to_num(0.0, 0.0, 0.0)
    options: dict[str, Any] = {
        "is_causal": causal, "kv_lengths": kv_lengths, "q_lengths": q_lengths, "q_start": q_start,
        "softcap": 100.0 if general else 0.0,
    }  # fmt: skip
    expected, tiles, bound = define(*clean, threshold=lam, **options)
    out, counts, lse = run(q, k, v, threshold=lam, **options)
    assert counts.tolist() == tiles.counts.tolist()
    assert (out.float() - expected).abs().max() <= 2 * bound + 1e-5
    for b, rows in enumerate(q_lengths.tolist()):
        assert not out[b, :, rows:].any()
        assert (lse[b, :, rows:] == -math.inf).all()


@pytest.mark.parametrize("br", [64, 128])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("what", ["window", "softcap", "additive", "boolean", "all"])
def test_general(what: str, size: int, br: int) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = planted(2, 4, 2, 600, 900, size)
    options: dict[str, Any] = {"is_causal": what != "boolean"}
    if what in ("window", "all"):
        options["window"] = 300
    if what in ("softcap", "all"):
        options["softcap"] = 30.0
    if what in ("additive", "all"):
        bias = torch.randn(2, 1, 600, 900, device="cuda", generator=generator)
        hidden = torch.rand(2, 1, 600, 900, device="cuda", generator=generator) < 0.2
        hidden[:, :, :, 256:400] = True
        options["bias"] = bias.masked_fill(hidden, torch.finfo(q.dtype).min).to(q.dtype)
    if what == "boolean":
        options["bias"] = torch.rand(1, 4, 600, 900, device="cuda", generator=generator) < 0.5
        options["bias"][:, :, :, 300:600] = False
    for lam in (0.0, THRESHOLD):
        check(q, k, v, threshold=lam, br=br, **options, must_skip=lam > 0 and what in ("softcap", "boolean"))


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("br", [64, 128])
def test_zero_threshold_is_the_dense_kernel_and_repeats_agree(size: int, causal: bool, br: int) -> None:
    q, k, v = planted(2, 4, 4, 1000, 1000, size)
    zero, one = (torch.tensor([x], device="cuda") for x in (0.0, 1.0))
    dense = run(q, k, v, is_causal=causal, br=br)[0]
    assert torch.equal(dense, run(q, k, v, is_causal=causal, br=br, threshold=THRESHOLD, threshold_scale=zero)[0])
    first, counts, _ = run(q, k, v, is_causal=causal, br=br, threshold=THRESHOLD)
    assert counts[:, 0].sum() > 0
    assert torch.equal(first, run(q, k, v, is_causal=causal, br=br, threshold=THRESHOLD, threshold_scale=one)[0])
    for _ in range(20):
        again, counts_again, _ = run(q, k, v, is_causal=causal, br=br, threshold=THRESHOLD)
        assert torch.equal(first, again) and torch.equal(counts, counts_again)


def test_calibrated_threshold_mixes_dense_and_skipping_entries() -> None:
    q, k, v = planted(2, 2, 2, 512, 2048, 128)
    lengths = torch.tensor([2048, 200], dtype=torch.int32, device="cuda")
    out, counts, _ = run(q, k, v, threshold_factor=300.0, kv_lengths=lengths)
    threshold = {"prefill": {"a": 300.0, "b": 1.0, "target": 0.0}}
    expected, tiles, bound = define(q, k, v, threshold=threshold, kv_lengths=lengths)  # type: ignore[arg-type]
    assert counts.tolist() == tiles.counts.tolist()
    assert counts[:, 0].sum() > 0
    assert (out.float() - expected).abs().max() <= 2 * bound + 1e-5


def test_sinks_and_lse() -> None:
    q, k, v = planted(1, 4, 4, 300, 700, 128)
    sinks = torch.tensor([0.0, 14.0, -5.0, 20.0], dtype=q.dtype, device="cuda")
    check(q, k, v, threshold=THRESHOLD, sinks=sinks, is_causal=True)
    lse = run(q, k, v)[2]
    scores = (q.float() @ k.float().transpose(-1, -2)) * 128**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "br"), [(64, 64), (64, 128), (128, 64), (128, 128), (256, 64)])
def test_log_sum_of_kept_tiles(size: int, br: int, dtype: torch.dtype) -> None:
    """Hopper's skipping kernels up to a head size of 128 sum P as it is multiplied, rounded; the others in float32."""
    for heads, rows in ((2, 300), (132, 700)):
        q, k, v = planted(1, heads, heads, rows, 900, size, dtype=dtype)
        _, tiles, _ = define(q, k, v, threshold=THRESHOLD, br=br, is_causal=True)
        _, counts, lse = run(q, k, v, threshold=THRESHOLD, br=br, is_causal=True)
        assert counts.tolist() == tiles.counts.tolist() and counts[:, 0].sum() > 0
        expected = log_sum_of_kept(q, k, tiles.kept, br, True)
        torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-4 + torch.finfo(dtype).eps / 2)


def test_sequence_major_strides_need_no_copy() -> None:
    q, k, v = planted(2, 4, 2, 333, 444, 128)
    q2, k2, v2 = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    assert q2.stride() != q.stride()
    assert torch.equal(run(q, k, v)[0], run(q2, k2, v2)[0])


def test_value_head_size() -> None:
    check(*planted(1, 2, 2, 300, 500, 128, value_size=64), threshold=THRESHOLD)
    check(*planted(1, 2, 2, 300, 500, 192, value_size=128), threshold=THRESHOLD, is_causal=True)


def test_tensors_of_more_than_two_to_the_31_elements() -> None:
    heads, columns = 130, 131072
    q = torch.randn(1, heads, 64, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, heads, columns, 128, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    v = torch.randn(1, heads, columns, 128, device="cuda", dtype=torch.bfloat16)
    out = run(q, k, v)[0]
    expected, _, bound = define(q[:, -1:], k[:, -1:], v[:, -1:])
    assert (out[:, -1:].float() - expected).abs().max() <= 2 * bound + 1e-5


def test_graph_capture_and_the_op() -> None:
    import sparse_attention

    q, k, v = planted(1, 4, 4, 512, 1024, 128)

    def attend() -> Tensor:
        return sparse_attention.block_skip_attention(q, k, v, threshold=THRESHOLD)

    eager = attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, eager)
    compiled = torch.compile(attend, fullgraph=True)
    assert torch.equal(compiled(), eager)
