"""What the op does with CUDA tensors, as far as that can be run without a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from sparse_attention import cuda, native
from sparse_attention.attention import OP
from sparse_attention.reference import attention
from sparse_attention.threshold import PhaseThreshold, Thresholds


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(native.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(native, "LIBRARY_NAME", "libnot_built.so")
    for cached in (native.load_library, cuda._library, cuda._warn_once):
        cached.cache_clear()
    yield
    for cached in (native.load_library, cuda._library, cuda._warn_once):
        cached.cache_clear()


def test_a_cuda_kernel_is_registered() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(OP.name(), "CUDA")


def test_without_the_library_the_definition_computes_and_one_warning_says_how_to_get_it(no_library: None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 200, 64, generator=generator) for heads in (4, 2, 2))
    k[:, :, 128:] *= 0.01
    options = {"br": 64, "bc": 128, "is_causal": True, "scale": 0.5, "softcap": 0.0, "window": 0, "unit": "head"}
    thresholds = Thresholds(prefill=PhaseThreshold(threshold=0.3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            out, counts = cuda.block_skip_attention_cuda(
                q, k, v, None, None, None, None, None, None, **options, **thresholds.attributes()
            )  # type: ignore[arg-type]
    expected, tiles = attention(q, k, v, threshold=thresholds, br=64, bc=128, is_causal=True, scale=0.5)
    assert torch.equal(out, expected) and torch.equal(counts, tiles.counts)
    assert counts[:, 0].sum() > 0
    assert [native.BUILD_COMMAND in str(w.message) for w in caught] == [True]


def test_tensors_are_read_in_place_where_the_copy_engine_can() -> None:
    q = torch.zeros(2, 4, 16, 64, dtype=torch.bfloat16)
    moved = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert cuda._readable(q) is q
    assert cuda._readable(moved) is moved
    for odd in (q.transpose(2, 3), q[:, :1].expand(2, 4, 16, 64), torch.zeros(1, 1, 4, 65)[..., :64]):
        assert cuda._readable(odd).is_contiguous()


def test_the_calibrated_factor() -> None:
    assert cuda._factor(PhaseThreshold(threshold=0.1)) == 0.0
    assert cuda._factor(PhaseThreshold(a=2.0, b=1.0, target=0.0)) == 2.0
    assert cuda._factor(PhaseThreshold(a=2.0, b=1e6, target=0.9)) == float("inf")
