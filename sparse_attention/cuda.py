"""The op on CUDA tensors: the compiled kernels where they can run it, else the definition in PyTorch with a warning."""

from __future__ import annotations

import functools
import math
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sparse_attention import native
from sparse_attention.errors import SparseAttentionError
from sparse_attention.reference import attention
from sparse_attention.threshold import PhaseThreshold, Thresholds

__all__ = ["block_skip_attention_cuda"]

KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def block_skip_attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kv_lengths: Tensor | None,
    q_start: Tensor | None,
    q_lengths: Tensor | None,
    sinks: Tensor | None,
    threshold_scale: Tensor | None,
    *,
    br: int,
    bc: int,
    is_causal: bool,
    scale: float,
    softcap: float,
    window: int,
    unit: str,
    **thresholds: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Sq, Dv]` and counts `[Hq, 2] int32` on the current stream; arguments as in the op."""
    library = _library()
    if library is not None:
        if q.dtype not in KERNEL_DTYPES:
            _warn_once(f"the compiled kernels take float16 and bfloat16, not {q.dtype}")
        else:
            with _on(q.device):
                result = _launch(
                    library, q, k, v, bias, kv_lengths, q_start, q_lengths, sinks, threshold_scale,
                    Thresholds.from_attributes(thresholds).phase(q.shape[2]), br, bc, is_causal, scale, softcap, window,
                    unit,
                )  # fmt: skip
            if result is not None:
                return result
    return block_skip_attention_by_definition(
        q, k, v, bias, kv_lengths, q_start, q_lengths, sinks, threshold_scale, br=br, bc=bc, is_causal=is_causal,
        scale=scale, softcap=softcap, window=window, unit=unit, **thresholds,
    )  # fmt: skip


def block_skip_attention_by_definition(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kv_lengths: Tensor | None, q_start: Tensor | None,
    q_lengths: Tensor | None, sinks: Tensor | None, threshold_scale: Tensor | None, *, br: int, bc: int,
    is_causal: bool, scale: float, softcap: float, window: int, unit: str, **thresholds: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op on any device as `sparse_attention.reference` computes it: the whole score matrix, nothing compiled."""
    out, tiles = attention(
        q, k, v, threshold=Thresholds.from_attributes(thresholds), br=br, bc=bc, is_causal=is_causal, scale=scale,
        softcap=softcap, bias=bias, window=window, kv_lengths=kv_lengths, q_start=q_start, q_lengths=q_lengths,
        sinks=sinks, unit=unit, threshold_scale=threshold_scale,
    )  # fmt: skip
    return out.to(q.dtype), tiles.counts


def _launch(
    library: native.Library, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kv_lengths: Tensor | None,
    q_start: Tensor | None, q_lengths: Tensor | None, sinks: Tensor | None, threshold_scale: Tensor | None,
    phase: PhaseThreshold, br: int, bc: int, is_causal: bool, scale: float, softcap: float, window: int, unit: str,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Runs the kernels; None where they do not support the call."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    batch, heads, rows, _ = q.shape
    if bias is not None:
        if bias.dtype != torch.bool:
            bias = bias.to(q.dtype)
        bias = bias.expand(batch, heads, rows, k.shape[2])
    out = q.new_empty(batch, heads, rows, v.shape[-1])
    counts = torch.empty(heads, 2, dtype=torch.int32, device=q.device)
    call = native.pack(
        q, k, v, out, counts=counts, bias=bias, sinks=None if sinks is None else sinks.to(q.dtype),
        kv_lengths=kv_lengths, q_start=q_start, q_lengths=q_lengths, threshold_scale=threshold_scale, br=br, bc=bc,
        is_causal=is_causal, window=window, softcap=softcap, scale=scale, unit=unit, threshold=phase.threshold,
        threshold_factor=_factor(phase),
    )  # fmt: skip
    call = call.with_workspace(torch.empty(library.workspace_size(call), dtype=torch.uint8, device=q.device))
    try:
        library.launch(call, torch.cuda.current_stream().cuda_stream)
    except native.KernelError:
        refusal = library.refusal(call)
        if not refusal:
            raise
        _warn_once(refusal)
        return None
    return out, counts


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device current; nothing where it is already, which is the usual case and costs a microsecond less."""
    return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def _readable(t: Tensor) -> Tensor:
    """The tensor itself where the copy engine can read it (the usual case), else a contiguous copy."""
    batch, head, row, one = t.stride()
    if one == 1 and not (batch | head | row) & 7 and batch and head and row and t.data_ptr() % 16 == 0:
        return t
    return t.contiguous()


def _factor(phase: PhaseThreshold) -> float:
    if phase.a <= 0:
        return 0.0
    try:
        return phase.a * math.exp(phase.b * phase.target)
    except OverflowError:  # an unbounded λ is dense, and so is what an infinite one divided by the length gives
        return math.inf


@functools.cache
def _library() -> native.Library | None:
    try:
        return native.load_library()
    except SparseAttentionError as error:
        _warn_once(f"{error.what} ({error.found}); get them with: {error.fix or native.BUILD_COMMAND}")
        return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"block_skip_attention computes by its definition in PyTorch, slowly and with the whole score matrix: {reason}",
        stacklevel=2,
    )
