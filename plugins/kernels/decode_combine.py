"""Last decode kernel: adds the chunks' partial results in their order; writes output and log-sum-exp, and counts the
tiles of what was computed without skipping."""

import triton
import triton.language as tl
from decode_common import CHUNK, LANES, TILE, chunks_seen, lane_places, lanes_of, wait_for_last_kernel
from plain_common import ALWAYS_KEEP, HAS_COUNTS, HAS_LSE, HAS_SINKS, LN_2, LOG2_E, batch_entry, log2_threshold

SLICE = tl.constexpr(32)  # columns of the output a program computes
ABREAST = tl.constexpr(64)  # chunks, or tiles, read at a time


@triton.jit
def _existing_tiles(block_max, mine, low, stop, BLOCK: tl.constexpr):
    """Number of tiles in which one of the lanes `mine` sees something."""
    PER_TILE: tl.constexpr = TILE // BLOCK
    count = tl.zeros([ABREAST], tl.int32)
    for tile0 in range(low // TILE, tl.cdiv(stop, TILE), ABREAST):
        block = tile0 * PER_TILE + tl.arange(0, ABREAST * PER_TILE)
        inside = (block >= low // BLOCK) & (block * BLOCK < stop)
        part = tl.load(block_max + lane_places(block[:, None]), mask=inside[:, None] & mine[None, :],
                       other=float("-inf"))  # fmt: skip
        count += (tl.max(tl.reshape(tl.max(part, 1), [ABREAST, PER_TILE]), 1) > float("-inf")).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def combine(
    q, k, v, o, bias, bias_bool, sinks, kv_lengths, q_start, q_lengths, threshold_scale, counts, lse, partial,
    chunk_max, chunk_sum, block_max, block_sum, probabilities, given, heads_q, heads_k, seq_q, seq_k, head_dim,
    head_dim_v, rows, row_blocks, splits, chunks, scale_log2, threshold, threshold_factor, window, softcap_log2,
    softcap_rate, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    bias_batch, bias_head, bias_row, bias_column, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = HEAD // SLICE
    program = tl.program_id(0)
    part, index = program % SLICES, program // SLICES
    row, head, batch = index % seq_q, index // seq_q % heads_q, index // seq_q // heads_q
    group = heads_q // heads_k
    row_block = head % group // (rows // seq_q)
    lane = head % group % (rows // seq_q) * seq_q + row
    item = ((batch * heads_k + head // group) * row_blocks + row_block).to(tl.int64)
    first, end, low, stop = chunks_seen(batch, kv_lengths, q_start, q_lengths, seq_q, seq_k, window, given)
    chunk_max += item * chunks * LANES + lane
    chunk_sum += item * chunks * LANES + lane
    column = part * SLICE + tl.arange(0, SLICE)
    partial += (item * chunks * rows + lane) * HEAD + column[None, :]

    wait_for_last_kernel(EARLY)
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([SLICE], tl.float32)
    for start in range(first, end, ABREAST):
        chunk = start + tl.arange(0, ABREAST)
        there = chunk < end
        sums = tl.load(chunk_sum + chunk * LANES, mask=there, other=0.0)
        maxima = tl.load(chunk_max + chunk * LANES, mask=there, other=float("-inf"))
        added = tl.load(partial + chunk.to(tl.int64)[:, None] * rows * HEAD, mask=there[:, None], other=0.0)
        m_new = tl.maximum(m, tl.max(maxima, 0))
        alpha = tl.where(m == float("-inf"), 0.0, tl.exp2(m - m_new))
        kept = sums != 0  # of a chunk without a kept tile there is no partial result; a NaN goes on
        weight = tl.where(kept, tl.exp2(maxima - m_new), 0.0)
        total = total * alpha + tl.sum(weight * sums, 0)
        acc = acc * alpha + tl.sum(tl.where(kept[:, None], weight[:, None] * added, 0.0), 0)
        m = m_new

    weight = total
    if (given & HAS_SINKS) != 0:
        weight += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2_E - m)
    out = tl.where(total == 0, 0.0, acc / weight)
    place = batch.to(tl.int64) * o_batch + head.to(tl.int64) * o_head + row.to(tl.int64) * o_row
    tl.store(o + place + column, out.to(o.dtype.element_ty), mask=column < head_dim_v)
    if part == 0:
        if (given & HAS_LSE) != 0:
            value = tl.where(total == 0, float("-inf"), (m + tl.log2(total)) * LN_2)
            tl.store(lse + index + tl.arange(0, 1), value)
        if (given & HAS_COUNTS) != 0 and row == 0:
            kv_end, _, _ = batch_entry(kv_lengths, q_start, q_lengths, batch, seq_q, seq_k, given)
            if log2_threshold(threshold, threshold_factor, threshold_scale, kv_end, given) == ALWAYS_KEEP:
                lane_head, lane_row = lanes_of(row_block, group, seq_q, rows)
                mine = (lane_head == head % group) & (lane_row >= 0)
                blocks = block_max + item * chunks * (CHUNK // BLOCK) * LANES
                tl.atomic_add(counts + head * 2 + 1, _existing_tiles(blocks, mine, low, stop, BLOCK), sem="relaxed")
