"""The benchmark's arithmetic; its timing needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.bench_decode import DecodeCase, DecodeResult, bench_decode
from export.bench_decode import default_cases as decode_cases
from export.bench_decode import format_table as decode_table
from export.bench_kernels import Case, Result, bench_kernels, default_cases, format_table
from sparse_attention.errors import MissingError


def test_figures_count_what_is_skipped_as_done() -> None:
    result = Result(
        Case(128, 1024, True, keep=0.5, batch=2, heads=4), 0.5, {"fa3": 2.0, "dense": 2.0, "skip 64x128": 1.5}
    )
    assert result.teraflops("dense") == pytest.approx(4 * 2 * 4 * 1024**2 * 128 / 2 / 2e-3 / 1e12)
    assert result.share_of_bound("skip 64x128") == pytest.approx((2.0 / 1.5) / (2 / 1.5))
    line = format_table([result])
    assert "skipped  50.0 %" in line and "(1.333, 100 % of the bound)" in line


def test_every_shape_of_the_tables_is_there() -> None:
    cases = default_cases()
    assert {c.size for c in cases} == {64, 128, 256}
    assert {c.length for c in cases if c.size == 128 and c.keep is None} >= {1024, 2048, 4096, 8192, 16384, 32768}
    assert {(c.keep, c.length, c.causal) for c in cases if c.size == 128 and c.keep} == {
        (keep, length, causal) for keep in (0.5, 0.25, 0.1) for length in (16384, 65536) for causal in (False, True)
    }
    assert any(c.uneven for c in cases) and any(c.heads != c.kv_heads for c in cases)
    assert len(default_cases(quick=True)) < len(cases) / 3


def test_a_module_of_flashinfer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file"):
        bench_kernels([], flashinfer=tmp_path / "module.so")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(MissingError, match="GPU"):
        bench_kernels([])
    with pytest.raises(MissingError, match="GPU"):
        bench_decode([])


def test_decode_figures_count_bytes_as_if_all_were_read() -> None:
    times = {"cudnn": 103.0, "dense": 100.0, "skip head": 80.0, "dense / 4": 120.0, "skip group / 4": 90.0}
    result = DecodeResult(DecodeCase(2, 1024, 0.5), {"head": 0.5, "group": 0.0}, times)
    assert result.terabytes_per_second("dense") == pytest.approx(2 * 8 * 1024 * 128 * 2 * 2 / 100e-6 / 1e12)
    assert result.share_of_bound("skip head") == pytest.approx((100 / 80) / (2 / 1.5))
    assert result.share_of_bound("skip group / 4") == pytest.approx(120 / 90)
    assert "(1.030)" in decode_table([result]) and "94 % of the bound" in decode_table([result])
    shapes = {(c.batch, c.length, c.keep) for c in decode_cases()}
    assert shapes >= {(b, s, keep) for b, s in ((1, 32768), (16, 8192), (16, 32768)) for keep in (None, 0.5, 0.2)}
