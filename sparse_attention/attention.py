"""`block_skip_attention`: the op as PyTorch sees it, with CPU, CUDA and fake kernels.

The registered op carries the same inputs and attributes as the ONNX op (both thresholds, because a traced graph serves
prefill and decode); the Python function in front of it is what people call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor

from sparse_attention.cpu import block_skip_attention_cpu
from sparse_attention.cuda import block_skip_attention_cuda
from sparse_attention.errors import UsageError
from sparse_attention.statistics import TileCounts
from sparse_attention.threshold import PhaseThreshold, Thresholds, threshold_attributes

Threshold = float | Mapping[str, float] | PhaseThreshold | Thresholds

LIBRARY = torch.library.Library("sparse_attention", "DEF")
LIBRARY.define(
    "block_skip_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? kv_lengths, Tensor? q_start, "
    "Tensor? q_lengths, Tensor? sinks, Tensor? threshold_scale, *, SymInt br, SymInt bc, bool is_causal, float scale, "
    "float softcap, SymInt window, str unit, float prefill_threshold, float prefill_a, float prefill_b, "
    "float prefill_target, float decode_threshold, float decode_a, float decode_b, float decode_target) "
    "-> (Tensor o, Tensor counts)"
)
OP = torch.ops.sparse_attention.block_skip_attention.default


@torch.library.register_fake("sparse_attention::block_skip_attention", lib=LIBRARY)
def _fake(q: Tensor, k: Tensor, v: Tensor, *optional: Tensor | None, **attributes: object) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    return q.new_empty(batch, heads, rows, v.shape[-1]), q.new_empty(heads, 2, dtype=torch.int32)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kv_lengths: Tensor | None, q_start: Tensor | None,
    q_lengths: Tensor | None, sinks: Tensor | None, threshold_scale: Tensor | None, *, br: int, bc: int,
    is_causal: bool, scale: float, softcap: float, window: int, unit: str, **thresholds: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return block_skip_attention_cpu(
        q, k, v, bias, kv_lengths, q_start, q_lengths, sinks, threshold_scale,
        threshold=Thresholds.from_attributes(thresholds).phase(q.shape[2]),
        br=1 if q.shape[2] == 1 else br, bc=bc, is_causal=is_causal, scale=scale, softcap=softcap, window=window,
        unit=unit,
    )  # fmt: skip


LIBRARY.impl("block_skip_attention", _cpu, "CPU")
LIBRARY.impl("block_skip_attention", block_skip_attention_cuda, "CUDA")


def _no_gradient(context: object, *gradients: object) -> None:
    raise UsageError(
        "block-skip attention has no gradient",
        where="block_skip_attention",
        found="backward() through it",
        fix='train the dense model: restore(model), or sparsify(model, config, path="softmax")',
    )


# Kernels write into buffers, which autograd must not see; and a gradient that is silently missing would be worse.
torch.library.register_autograd("sparse_attention::block_skip_attention", _no_gradient, lib=LIBRARY)


@overload
def block_skip_attention(
    q: Tensor, k: Tensor, v: Tensor, *, threshold: Threshold, br: int = ..., bc: int = ..., is_causal: bool = ...,
    scale: float | None = ..., softcap: float = ..., bias: Tensor | None = ..., window: int = ...,
    kv_lengths: Tensor | None = ..., q_start: Tensor | None = ..., q_lengths: Tensor | None = ...,
    sinks: Tensor | None = ..., unit: str = ..., threshold_scale: Tensor | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_skip_attention(
    q: Tensor, k: Tensor, v: Tensor, *, threshold: Threshold, br: int = ..., bc: int = ..., is_causal: bool = ...,
    scale: float | None = ..., softcap: float = ..., bias: Tensor | None = ..., window: int = ...,
    kv_lengths: Tensor | None = ..., q_start: Tensor | None = ..., q_lengths: Tensor | None = ...,
    sinks: Tensor | None = ..., unit: str = ..., threshold_scale: Tensor | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, TileCounts]: ...  # fmt: skip
def block_skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    threshold: Threshold,
    br: int = 128,
    bc: int = 128,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    window: int = 0,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    q_lengths: Tensor | None = None,
    sinks: Tensor | None = None,
    unit: str = "head",
    threshold_scale: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TileCounts]:
    """Attention that skips the softmax and the PV product of tiles whose scores lie far below the running maximum.

    A tile of `br` query rows and `bc` key columns is skipped where every row that sees anything has
    `m - M < ln λ`: m its maximum in the tile, M its running maximum. The softmax runs over the tiles that are kept.
    With λ = 0 nothing is skipped. BLASST, arXiv:2512.12087; defined in `sparse_attention.reference`.

    Args:
        q: `[B, Hq, Sq, D]` float32, float16 or bfloat16; scores and decisions are float32 whatever the dtype.
        k, v: `[B, Hk, Sk, D]` and `[B, Hk, Sk, Dv]` in q's dtype, `Hq % Hk == 0` (GQA without expanding).
        threshold: λ in [0, 1), natural scale; a number, `{"prefill": λ, "decode": λ}`, or calibrated `Thresholds`.
            Decode is `Sq == 1`.
        br, bc: rows and columns of a tile, positive; `br` is 1 in decode.
        is_causal: row i sees key j only where `j <= i + q_start` (with the default `q_start`: lower right aligned).
        scale: positive, default `1 / sqrt(D)`.
        softcap: scores become `softcap * tanh(scores / softcap)`; 0 = none.
        bias: additive (q's dtype) or boolean (True = attend), broadcastable to `[B, Hq, Sq, Sk]`.
        window: row i sees key j only where `j > i + q_start - window`; 0 = none.
        kv_lengths, q_start, q_lengths: `[B]` integers: valid keys (Sk), position of row 0 (Sk - Sq), valid rows (Sq).
        sinks: `[Hq]`, one extra logit per head that joins the denominator only.
        unit: "head" decides per query head, "group" jointly over the heads that share a K/V head.
        threshold_scale: `[1]` float32, multiplies λ.
        return_stats: return `(o, TileCounts)`.

    Returns:
        `[B, Hq, Sq, Dv]` in q's dtype; rows that see nothing are 0.

    Raises:
        UsageError: shapes, dtypes or values that do not fit together.
    """
    _validate(q, k, v, br, bc, scale, softcap, window, unit, bias, sinks)
    lengths = [None if t is None else t.to(torch.int32) for t in (kv_lengths, q_start, q_lengths)]
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    out, counts = OP(
        q, k, v, bias, *lengths, sinks, threshold_scale, br=br, bc=bc, is_causal=is_causal,
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale), softcap=float(softcap or 0.0), window=window or 0,
        unit=unit, **threshold_attributes(threshold),
    )  # fmt: skip
    return (out, TileCounts.of(counts)) if return_stats else out


def _validate(
    q: Tensor, k: Tensor, v: Tensor, br: int, bc: int, scale: float | None, softcap: float, window: int, unit: str,
    bias: Tensor | None, sinks: Tensor | None,
) -> None:  # fmt: skip
    def require(condition: bool, what: str, found: object, fix: str) -> None:
        if not condition:
            raise UsageError(
                what, where="block_skip_attention", found=str(found() if callable(found) else found), fix=fix
            )

    def shapes() -> str:  # put into words only where they are wanted
        return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"

    def dtypes() -> str:
        return f"q {q.dtype}, k {k.dtype}, v {v.dtype}"

    require(q.dim() == k.dim() == v.dim() == 4, "q, k and v must have four dimensions", shapes, "pass [B, H, S, D]")
    require(
        q.shape[-1] == k.shape[-1] and k.shape[1] == v.shape[1], "q, k and v do not fit together", shapes,
        "q and k share D; k and v share the number of heads",
    )  # fmt: skip
    require(
        q.shape[1] % k.shape[1] == 0, "the query heads must be a multiple of the key heads", shapes, "check Hq and Hk"
    )
    require(
        q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.float16, torch.bfloat16),
        "q, k and v must share one of the dtypes float32, float16, bfloat16", dtypes, "cast them first",
    )  # fmt: skip
    require(br > 0 and bc > 0, "tiles need at least one row and one column", f"br={br}, bc={bc}", "use 128 and 128")
    require(scale is None or scale > 0, "scale must be positive", scale, "leave it out for 1 / sqrt(D)")
    require((softcap or 0) >= 0, "softcap must not be negative", softcap, "use 0 for none")
    require((window or 0) >= 0, "window must not be negative", window, "use 0 for none")
    require(unit in ("head", "group"), "unknown unit of decision", repr(unit), 'use "head" or "group"')
    require(bias is None or bias.dim() <= 4, "bias has too many dimensions", bias is not None and list(bias.shape),
            "it must broadcast to [B, Hq, Sq, Sk]")  # fmt: skip
    require(sinks is None or tuple(sinks.shape) == (q.shape[1],), "sinks needs one value per query head",
            sinks is not None and list(sinks.shape), f"pass [{q.shape[1]}]")  # fmt: skip
