"""First decode kernel: the scores of every visible key; where nothing is skipped, also the products with V."""

import triton
import triton.language as tl
from decode_common import (
    CHUNK,
    LANES,
    blocks_of,
    chunks_seen,
    lane_places,
    lanes_of,
    let_next_kernel_start,
    share_of,
    unpack_item,
)
from plain_common import (
    ALWAYS_KEEP,
    HAS_ADDITIVE_BIAS,
    HAS_BOOL_BIAS,
    HAS_COUNTS,
    LOG2_E,
    batch_entry,
    log2_threshold,
    seen_by,
)


@triton.jit
def _clear_counts(counts, heads_q):
    for start in range(0, 2 * heads_q, 128):
        place = start + tl.arange(0, 128)
        tl.store(counts + place, 0, mask=place < 2 * heads_q)


@triton.jit
def _visible_scores(q, k, key, low, high, scale_log2, softcap_log2, softcap_rate, bias, bias_bool, bias_place,
                    bias_column, given, HIDES: tl.constexpr):  # fmt: skip
    """Scores `[16, BLOCK]` of a block of keys, -inf where a lane does not see the key."""
    scores = tl.dot(q, k)
    if softcap_log2 > 0:  # noqa: SIM108
        # softcap * tanh(scale * scores / softcap)
        scores = softcap_log2 * (1 - 2 / (tl.exp2(scores * softcap_rate) + 1))
    else:
        scores = scores * scale_log2
    visible = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
    if (given & (HAS_ADDITIVE_BIAS | HAS_BOOL_BIAS)) != 0:
        place = bias_place[:, None] + key.to(tl.int64)[None, :] * bias_column
        if (given & HAS_BOOL_BIAS) != 0:
            visible = visible & (tl.load(bias_bool + place, mask=visible, other=0) != 0)
        else:
            added = tl.load(bias + place, mask=visible, other=0.0).to(tl.float32)
            visible = visible & (added > HIDES)
            scores += added * LOG2_E
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def scores(
    q, k, v, o, bias, bias_bool, sinks, kv_lengths, q_start, q_lengths, threshold_scale, counts, lse, partial,
    chunk_max, chunk_sum, block_max, block_sum, probabilities, given, heads_q, heads_k, seq_q, seq_k, head_dim,
    head_dim_v, rows, row_blocks, splits, chunks, scale_log2, threshold, threshold_factor, window, softcap_log2,
    softcap_rate, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    bias_batch, bias_head, bias_row, bias_column, HEAD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    HIDES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(EARLY)
    program = tl.program_id(0)
    if program == 0 and (given & HAS_COUNTS) != 0:
        _clear_counts(counts, heads_q)
    split, item = program % splits, program // splits
    batch, kv_head, row_block = unpack_item(item, heads_k, row_blocks)
    group = heads_q // heads_k
    first, end, low_key, stop = chunks_seen(batch, kv_lengths, q_start, q_lengths, seq_q, seq_k, window, given)
    begin, finish = share_of(split, splits, first, end)
    PER_CHUNK: tl.constexpr = CHUNK // BLOCK
    block0, block1 = blocks_of(begin, finish, low_key, stop, BLOCK)

    kv_end, q_end, start = batch_entry(kv_lengths, q_start, q_lengths, batch, seq_q, seq_k, given)
    head, row = lanes_of(row_block, group, seq_q, rows)
    low, high = seen_by(row, kv_end, q_end, start, window, given)
    batch, head, row = batch.to(tl.int64), (kv_head * group + head).to(tl.int64), row.to(tl.int64)
    bias_place = batch * bias_batch + head * bias_head + row * bias_row
    lane, d, n = tl.arange(0, LANES), tl.arange(0, HEAD), tl.arange(0, BLOCK)
    query = tl.load(
        q + (batch * q_batch + head * q_head + row * q_row)[:, None] + d[None, :],
        mask=(row >= 0)[:, None] & (d < head_dim)[None, :], other=0.0,
    )  # fmt: skip
    keys = k + batch * k_batch + kv_head.to(tl.int64) * k_head + n.to(tl.int64)[None, :] * k_row + d[:, None]
    values = v + batch * v_batch + kv_head.to(tl.int64) * v_head + n.to(tl.int64)[:, None] * v_row + d[None, :]
    item = item.to(tl.int64)
    chunk_max += item * chunks * LANES
    chunk_sum += item * chunks * LANES
    partial += item * chunks * rows * HEAD
    block_max += item * chunks * PER_CHUNK * LANES
    block_sum += item * chunks * PER_CHUNK * LANES
    probabilities += item * rows * chunks * CHUNK

    m = tl.full([LANES], float("-inf"), tl.float32)
    if log2_threshold(threshold, threshold_factor, threshold_scale, kv_end, given) == ALWAYS_KEEP:
        total = tl.zeros([LANES], tl.float32)
        acc = tl.zeros([LANES, HEAD], tl.float32)
        for i in tl.range(block0, block1, num_stages=STAGES):
            block = tl.cast(i, tl.int32)  # already is, unless interpreted
            key = block * BLOCK + n
            there = key < kv_end
            step = block.to(tl.int64) * BLOCK
            tile = tl.load(keys + step * k_row, mask=there[None, :] & (d < head_dim)[:, None], other=0.0)
            s = _visible_scores(query, tile, key, low, high, scale_log2, softcap_log2, softcap_rate, bias, bias_bool,
                                bias_place, bias_column, given, HIDES)  # fmt: skip
            m_block = tl.max(s, 1)
            tl.store(block_max + lane_places(block), m_block)  # tells the last kernel which tiles exist
            m_new = tl.maximum(m, m_block)
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - shift[:, None])
            alpha = tl.exp2(m - shift)
            m = m_new
            total = total * alpha + tl.sum(p, 1)
            value = tl.load(values + step * v_row, mask=there[:, None] & (d < head_dim_v)[None, :], other=0.0)
            acc = tl.dot(p.to(value.dtype), value, acc * alpha[:, None])
            if block % PER_CHUNK == PER_CHUNK - 1 or block == block1 - 1:
                chunk = block // PER_CHUNK
                tl.store(chunk_max + lane_places(chunk), m)
                tl.store(chunk_sum + lane_places(chunk), total)
                place = (chunk.to(tl.int64) * rows + lane) * HEAD
                tl.store(partial + place[:, None] + d[None, :], acc, mask=(lane < rows)[:, None])
                m = tl.full([LANES], float("-inf"), tl.float32)
                total = tl.zeros([LANES], tl.float32)
                acc = tl.zeros([LANES, HEAD], tl.float32)
    else:
        for i in tl.range(block0, block1, num_stages=STAGES):
            block = tl.cast(i, tl.int32)  # already is, unless interpreted
            key = block * BLOCK + n
            step = block.to(tl.int64) * BLOCK
            tile = tl.load(keys + step * k_row, mask=(key < kv_end)[None, :] & (d < head_dim)[:, None], other=0.0)
            s = _visible_scores(query, tile, key, low, high, scale_log2, softcap_log2, softcap_rate, bias, bias_bool,
                                bias_place, bias_column, given, HIDES)  # fmt: skip
            m_block = tl.max(s, 1)
            p = tl.exp2(s - tl.where(m_block == float("-inf"), 0.0, m_block)[:, None])
            tl.store(block_max + lane_places(block), m_block)
            tl.store(block_sum + lane_places(block), tl.sum(p, 1))
            place = lane.to(tl.int64)[:, None] * (chunks * CHUNK) + key[None, :]
            tl.store(probabilities + place, p.to(query.dtype), mask=(lane < rows)[:, None])
            m = tl.maximum(tl.where(block % PER_CHUNK == 0, float("-inf"), m), m_block)
            tl.store(chunk_max + lane_places(block // PER_CHUNK), m)
