"""What the three decode kernels share: how the work is cut up, and where intermediate results lie.

A decode call has at most 16 query rows. The rows of the query heads that share a K/V head are computed together, as
the 16 lanes of a tensor-core operand: an *item* is a batch entry, a K/V head and a block of 16 lanes. Its keys are cut
into *chunks* of CHUNK keys; a program takes a run of chunks, and every chunk has a partial result of its own. So
however many programs share the keys, the same numbers are added in the same order.

Workspace, by item (csrc/launch_decode.cpp lays it out; float32 but for the probabilities):
    chunk_max, chunk_sum  [chunks, 16]         maximum of the chunk's scores; sum of exp2(score - maximum), kept tiles
    partial               [chunks, rows, HEAD] the same sum, each term times its row of V
    block_max, block_sum  [blocks, 16]         the same of a block of BLOCK keys, whether kept or not
    probabilities         [rows, keys] dtype   exp2(score - maximum of the block)
Scores are in log2 units (scores * log2(e)).
"""

import triton
import triton.language as tl
from plain_common import batch_entry, seen_by
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LANES = tl.constexpr(16)
CHUNK = tl.constexpr(512)  # keys of a partial result
TILE = tl.constexpr(128)  # keys of a decision


@triton.jit
def let_next_kernel_start(EARLY: tl.constexpr):
    """From 9.0 on: the next kernel may take the place that this one leaves, up to its `wait_for_last_kernel`."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_last_kernel(EARLY: tl.constexpr):
    """Behind it the kernel before has ended, and with it those before that one: every program of each passes here."""
    if EARLY:
        gdc_wait()


@triton.jit
def unpack_item(item, heads_k, row_blocks):
    """`(batch, K/V head, row block)`."""
    return item // row_blocks // heads_k, item // row_blocks % heads_k, item % row_blocks


@triton.jit
def lanes_of(row_block, group, seq_q, rows):
    """`(head within the group, query row)` of each lane, row -1 where there is none. `rows` lanes are in use."""
    lane = tl.arange(0, LANES)
    head = row_block * (rows // seq_q) + lane // seq_q
    return head, tl.where((lane < rows) & (head < group), lane % seq_q, -1)


@triton.jit
def chunks_seen(batch, kv_lengths, q_start, q_lengths, seq_q, seq_k, window, given):
    """`(first, end, low, stop)`: some row sees keys of `[low, stop)` and of no other place, chunks `[first, end)`."""
    kv_end, q_end, start = batch_entry(kv_lengths, q_start, q_lengths, batch, seq_q, seq_k, given)
    low, _ = seen_by(0, kv_end, q_end, start, window, given)
    _, stop = seen_by(q_end - 1, kv_end, q_end, start, window, given)
    stop = tl.maximum(stop, 0)
    low = tl.minimum(low, stop)
    return low // CHUNK, tl.cdiv(stop, CHUNK), low, stop


@triton.jit
def share_of(split, splits, first, end):
    """The run of chunks `[begin, finish)` of one of the programs that share `[first, end)`."""
    each = tl.cdiv(end - first, splits)
    begin = tl.minimum(first + split * each, end)
    return begin, tl.minimum(begin + each, end)


@triton.jit
def blocks_of(begin, finish, low, stop, BLOCK: tl.constexpr):
    """Blocks `[start, end)` of the chunks `[begin, finish)` that hold keys of `[low, stop)`."""
    start = tl.maximum(begin * (CHUNK // BLOCK), low // BLOCK)
    return start, tl.minimum(finish * (CHUNK // BLOCK), tl.cdiv(stop, BLOCK))


@triton.jit
def lane_places(row0):
    """Where the 16 lanes of rows `row0` (a scalar or a column vector) of a `[rows, 16]` array lie."""
    return row0 * LANES + tl.arange(0, LANES)
