"""Which portable prefill kernels (plain Triton) are compiled, and how each is shaped.

A kernel is chosen by dtype, head size, rows of a decision, and whether window, soft-cap or bias are asked for; all else
is an argument. The Triton compiler makes one PTX of each, for 8.0: mma.sync and cp.async, which every later GPU has.
ptxas makes of it the machine code of each architecture, so what ran on one card is what the others run.
"""

from __future__ import annotations

from plain_kernel import PlainKernel

DTYPES = ("fp16", "bf16")
HEADS = (64, 128, 256)
ROWS = (64, 128)
ARCHITECTURES = (80, 100, 120)
STAGES = {64: 3, 128: 2, 256: 3}
"""Tiles of K in flight, and one; at 256 it is pieces of Q and K. As many as 99 KB hold beside Q and a piece of V."""
ACCEPTED_SPILLS = {
    ("skip", 64): 0, ("skip", 128): 256, ("skip", 256): 1280,
    ("general", 64): 192, ("general", 128): 1024, ("general", 256): 2304,
}  # fmt: skip
"""Bytes a thread may spill, by role and head size; what the build last reported and a little more."""

ARGUMENTS = (
    "q:*T:16 k:*T:16 v:*T:16 o:*T:16 kv_lengths:*i32 q_start:*i32 q_lengths:*i32 threshold_scale:*fp32 sinks:*T "
    "counts:*i32 lse:*fp32 bias:*T bias_bool:*u8 q_batch:i64:8 q_head:i64:8 q_row:i64:8 k_batch:i64:8 k_head:i64:8 "
    "k_row:i64:8 v_batch:i64:8 v_head:i64:8 v_row:i64:8 o_batch:i64:8 o_head:i64:8 o_row:i64:8 bias_batch:i64 "
    "bias_head:i64 bias_row:i64 bias_column:i64 given:i32 heads_q:i32 group:i32 seq_q:i32 seq_k:i32 head_dim:i32:8 "
    "head_dim_v:i32:8 row_blocks:i32 heads:i32 section:i32 scale_log2:fp32 threshold:fp32 threshold_factor:fp32 "
    "window:i32 softcap_log2:fp32 softcap_rate:fp32"
)
"""Arguments of the kernel in its order. csrc/launch_prefill.cpp fills them by this list."""


def _specialise(architecture: int, dtype: str, head: int, role: str, rows: int) -> PlainKernel:
    constants = (("HEAD", head), ("ROWS", rows), ("STAGES", STAGES[head]), ("GENERAL", role == "general"))
    return PlainKernel(
        family="prefill", module="portable_prefill", function="portable_prefill", arguments=ARGUMENTS,
        constants=constants, architecture=architecture, ptx=80, dtype=dtype, head=head, role=role, rows=rows,
        columns=128, warps=rows // 16, stages=STAGES[head], joint=rows == 128, spills=ACCEPTED_SPILLS[role, head],
    )  # fmt: skip


def _of(architecture: int) -> list[PlainKernel]:
    return [
        _specialise(architecture, dtype, head, role, rows)
        for dtype in DTYPES
        for head in HEADS
        for role in ("skip", "general")
        for rows in ROWS
    ]


def all_specialisations() -> list[PlainKernel]:
    """Every kernel of the family."""
    return [spec for architecture in ARCHITECTURES for spec in _of(architecture)]


def hopper_specialisations() -> list[PlainKernel]:
    """The same for 9.0, which has kernels of its own: only to try the family on such a card."""
    return _of(90)
