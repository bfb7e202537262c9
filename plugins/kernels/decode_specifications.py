"""Which decode kernels are compiled, and how each is shaped."""

from __future__ import annotations

from plain_kernel import ARCHITECTURES, PlainKernel

DTYPES = {"fp16": -32752.0, "bf16": -1.6947657e38}
"""An additive bias at or below this hides the key: half of the dtype's minimum."""

ARGUMENTS = (
    "q:*T:16 k:*T:16 v:*T:16 o:*T:16 bias:*T bias_bool:*u8 sinks:*T kv_lengths:*i32 q_start:*i32 q_lengths:*i32 "
    "threshold_scale:*fp32 counts:*i32 lse:*fp32 partial:*fp32:16 chunk_max:*fp32:16 chunk_sum:*fp32:16 "
    "block_max:*fp32:16 block_sum:*fp32:16 probabilities:*T:16 given:i32 heads_q:i32 heads_k:i32 seq_q:i32 seq_k:i32 "
    "head_dim:i32:8 head_dim_v:i32:8 rows:i32 row_blocks:i32 splits:i32 chunks:i32 scale_log2:fp32 threshold:fp32 "
    "threshold_factor:fp32 window:i32 softcap_log2:fp32 softcap_rate:fp32 q_batch:i64:8 q_head:i64:8 q_row:i64:8 "
    "k_batch:i64:8 k_head:i64:8 k_row:i64:8 v_batch:i64:8 v_head:i64:8 v_row:i64:8 o_batch:i64:8 o_head:i64:8 "
    "o_row:i64:8 bias_batch:i64 bias_head:i64 bias_row:i64 bias_column:i64"
)
"""Of all three kernels, in this order; csrc/launch_decode.cpp fills them in."""

BLOCKS = {64: 128, 128: 64, 256: 32}
"""Keys of a loaded block, by head size. The rounding of a result depends on it, so it is the same everywhere."""

STAGES = {80: 3, 90: 4, 100: 4, 120: 3}
"""Blocks in flight: what fits the shared memory of every device of the architecture."""

ACCEPTED_SPILLS = 32
"""Bytes a thread may spill. The build reports none but 4 and 16 in two of the kernels that decide."""


def _specialise(architecture: int, dtype: str, head: int, role: str) -> PlainKernel:
    early = architecture >= 90
    constants: dict[str, int | float] = {"HEAD": head, "BLOCK": BLOCKS[head]}
    if role != "combine":
        constants["STAGES"] = STAGES[architecture]
    if role == "scores":
        constants["HIDES"] = DTYPES[dtype]
    constants["EARLY"] = early
    return PlainKernel(
        "decode", f"decode_{role}", role, ARGUMENTS, tuple(constants.items()), architecture, dtype, head, role,
        rows=16, columns=BLOCKS[head], warps=4, stages=STAGES[architecture],
        early=early and role != "scores", spills=ACCEPTED_SPILLS,
    )  # fmt: skip


def all_specialisations() -> list[PlainKernel]:
    """Every decode kernel of the library."""
    return [
        _specialise(architecture, dtype, head, role)
        for architecture in ARCHITECTURES
        for dtype in DTYPES
        for head in BLOCKS
        for role in ("scores", "values", "combine")
    ]
