"""What kernels in plain Triton share: the bits of `given`, the threshold, and what a batch entry's rows can see."""

import triton
import triton.language as tl

ALWAYS_KEEP = tl.constexpr(-1e29)  # log2 of a zero threshold
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# bits of `given`; csrc/given.h has the same list
HAS_KV_LENGTHS = tl.constexpr(1)
HAS_Q_START = tl.constexpr(2)
HAS_Q_LENGTHS = tl.constexpr(4)
HAS_THRESHOLD_SCALE = tl.constexpr(8)
HAS_SINKS = tl.constexpr(16)
HAS_COUNTS = tl.constexpr(32)
HAS_LSE = tl.constexpr(64)
HAS_ADDITIVE_BIAS = tl.constexpr(256)
HAS_BOOL_BIAS = tl.constexpr(512)
IS_CAUSAL = tl.constexpr(4096)
UNIT_GROUP = tl.constexpr(16384)  # the heads that share a K/V head decide together


@triton.jit
def log2_threshold(threshold, threshold_factor, threshold_scale, kv_end, given):
    """log2 of the threshold of a batch entry; ALWAYS_KEEP where it is zero or means dense."""
    value = threshold
    if threshold_factor > 0:
        value = threshold_factor / kv_end.to(tl.float32)
    if (given & HAS_THRESHOLD_SCALE) != 0:
        value = value * tl.load(threshold_scale)
    return tl.where((value > 0) & (value < 1), tl.log2(value), ALWAYS_KEEP)


@triton.jit
def batch_entry(kv_lengths, q_start, q_lengths, batch, seq_q, seq_k, given):
    """`(kv_end, q_end, start)` of a batch entry: its keys, its query rows, and the key position of row 0."""
    kv_end = seq_k
    q_end = seq_q
    start = seq_k - seq_q
    if (given & HAS_KV_LENGTHS) != 0:
        kv_end = tl.maximum(tl.minimum(tl.load(kv_lengths + batch), seq_k), 0)
    if (given & HAS_Q_LENGTHS) != 0:
        q_end = tl.maximum(tl.minimum(tl.load(q_lengths + batch), seq_q), 0)
    if (given & HAS_Q_START) != 0:
        start = tl.load(q_start + batch)
    return kv_end, q_end, start


@triton.jit
def seen_by(row, kv_end, q_end, start, window, given):
    """Keys `[low, high)` that each `row` sees, biases aside; nothing for rows that do not exist."""
    low = row * 0
    high = kv_end + row * 0
    if (given & IS_CAUSAL) != 0:
        high = tl.minimum(high, row + start + 1)
    if window > 0:
        low = tl.maximum(row + start - window + 1, 0)
    return low, tl.where((row < q_end) & (row >= 0), high, 0)
