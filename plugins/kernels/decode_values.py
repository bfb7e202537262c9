"""Second decode kernel: decides every tile, and adds up the rows of V of the tiles that are kept. V of a tile that no
lane keeps is not loaded."""

import triton
import triton.language as tl
from decode_common import (
    CHUNK,
    LANES,
    TILE,
    blocks_of,
    chunks_seen,
    lane_places,
    lanes_of,
    let_next_kernel_start,
    share_of,
    unpack_item,
    wait_for_last_kernel,
)
from plain_common import ALWAYS_KEEP, HAS_COUNTS, UNIT_GROUP, batch_entry, log2_threshold

WINDOW = tl.constexpr(16)  # tiles decided at a time, one bit each
ABREAST = tl.constexpr(64)  # chunks read at a time


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _count_bits(x):
    """Number of bits set in a non-negative number of at most WINDOW bits."""
    x = x - ((x >> 1) & 0x5555)
    x = (x & 0x3333) + ((x >> 2) & 0x3333)
    x = (x + (x >> 4)) & 0x0F0F
    return (x + (x >> 8)) & 0x1F


@triton.jit
def _places_of_bits(x):
    """The places of the bits set, lowest first, four bits each in one number: an address that depends on the loop's own
    counter alone can be prefetched, one that is carried from turn to turn cannot."""
    place = tl.arange(0, WINDOW)
    nth = _count_bits(x & ((1 << place) - 1))
    return tl.sum(tl.where(((x >> place) & 1) != 0, place.to(tl.int64) << (4 * nth), 0), 0)


@triton.jit
def _maximum_before(chunk_max, first, begin):
    """Running maximum of each lane over the chunks `[first, begin)`."""
    m = tl.full([LANES], float("-inf"), tl.float32)
    for start in range(first, begin, ABREAST):
        chunk = start + tl.arange(0, ABREAST)
        part = tl.load(chunk_max + lane_places(chunk[:, None]), mask=(chunk < begin)[:, None], other=float("-inf"))
        m = tl.maximum(m, tl.max(part, 0))
    return m


@triton.jit
def _decide(m_block, m, log2_lambda, BLOCK: tl.constexpr):
    """`(wants, sees, m)` of each lane for a window: tiles it wants and tiles it sees something in, as bits, and the
    running maximum behind them. `m_block` is `[blocks of the window, 16]`."""
    tile_max = tl.max(tl.reshape(m_block, [WINDOW, TILE // BLOCK, LANES]), 1)
    running = tl.maximum(tl.associative_scan(tile_max, 0, _larger), m[None, :])
    bit = 1 << tl.arange(0, WINDOW)[:, None]
    # a lane that has seen nothing has a gap of -inf - -inf, which compares as false: it does not vote
    wants = tl.sum(tl.where(tile_max - running >= log2_lambda, bit, 0), 0)
    sees = tl.sum(tl.where(tile_max > float("-inf"), bit, 0), 0)
    return wants, sees, tl.maximum(m, tl.max(tile_max, 0))


@triton.jit
def _any_of(bits, same):
    """Bits that any lane of the same unit has; `same` is `[16, 16]`."""
    return tl.reduce(tl.where(same, bits[None, :], 0), 1, _either)


@triton.jit
def values(
    q, k, v, o, bias, bias_bool, sinks, kv_lengths, q_start, q_lengths, threshold_scale, counts, lse, partial,
    chunk_max, chunk_sum, block_max, block_sum, probabilities, given, heads_q, heads_k, seq_q, seq_k, head_dim,
    head_dim_v, rows, row_blocks, splits, chunks, scale_log2, threshold, threshold_factor, window, softcap_log2,
    softcap_rate, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    bias_batch, bias_head, bias_row, bias_column, HEAD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    let_next_kernel_start(EARLY)
    program = tl.program_id(0)
    split, item = program % splits, program // splits
    batch, kv_head, row_block = unpack_item(item, heads_k, row_blocks)
    group = heads_q // heads_k
    kv_end, _, _ = batch_entry(kv_lengths, q_start, q_lengths, batch, seq_q, seq_k, given)
    log2_lambda = log2_threshold(threshold, threshold_factor, threshold_scale, kv_end, given)
    first, end, low, stop = chunks_seen(batch, kv_lengths, q_start, q_lengths, seq_q, seq_k, window, given)
    begin, finish = share_of(split, splits, first, end)
    if log2_lambda == ALWAYS_KEEP:
        finish = begin  # the first kernel has done it all
    block0, block1 = blocks_of(begin, finish, low, stop, BLOCK)
    head, row = lanes_of(row_block, group, seq_q, rows)
    same_head = head[:, None] == head[None, :]
    together = (given & UNIT_GROUP) != 0

    PER_CHUNK: tl.constexpr = CHUNK // BLOCK
    PER_TILE: tl.constexpr = TILE // BLOCK
    BLOCKS: tl.constexpr = WINDOW * PER_TILE
    CHUNKS: tl.constexpr = WINDOW * TILE // CHUNK
    lane, d, n = tl.arange(0, LANES), tl.arange(0, HEAD), tl.arange(0, BLOCK)
    head0 = batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    values = v + head0 + n.to(tl.int64)[:, None] * v_row + d[None, :]
    item = item.to(tl.int64)
    item_max = chunk_max + item * chunks * LANES
    item_blocks = block_max + item * chunks * PER_CHUNK * LANES
    chunk_sum += item * chunks * LANES
    partial += item * chunks * rows * HEAD
    block_sum += item * chunks * PER_CHUNK * LANES
    probabilities += item * rows * chunks * CHUNK + lane.to(tl.int64)[:, None] * (chunks * CHUNK) + n[None, :]

    wait_for_last_kernel(EARLY)
    m = tl.full([LANES], float("-inf"), tl.float32)
    if begin < finish:
        m = _maximum_before(item_max, first, begin)
    for start in range(begin, finish, CHUNKS):
        chunk0 = tl.cast(start, tl.int32)  # already is, unless interpreted
        blocks = chunk0 * PER_CHUNK + tl.arange(0, BLOCKS)
        inside = ((blocks >= block0) & (blocks < block1))[:, None]
        m_block = tl.load(item_blocks + lane_places(blocks[:, None]), mask=inside, other=float("-inf"))
        l_block = tl.load(block_sum + lane_places(blocks[:, None]), mask=inside, other=0.0)
        m_before = m
        wants, sees, m = _decide(m_block, m_before, log2_lambda, BLOCK)
        sees = _any_of(sees, same_head)
        if together:
            wants = tl.reduce(wants, 0, _either) + wants * 0
            for other in range(row_blocks - 1):  # the heads of the group that did not fit these lanes
                neighbour = item - row_block + other + (other >= row_block).to(tl.int32)
                m_there = _maximum_before(chunk_max + neighbour * chunks * LANES, first, chunk0)
                blocks_there = block_max + neighbour * chunks * PER_CHUNK * LANES
                m_block_there = tl.load(blocks_there + lane_places(blocks[:, None]), mask=inside, other=float("-inf"))
                theirs, _sees, m_there = _decide(m_block_there, m_there, log2_lambda, BLOCK)
                wants = wants | tl.reduce(theirs, 0, _either)
        else:
            wants = _any_of(wants, same_head)
        takes = wants & sees
        if (given & HAS_COUNTS) != 0:
            tally = counts + (kv_head * group + head) * 2
            tl.atomic_add(tally, _count_bits(sees & (wants ^ 0xFFFF)), mask=row == 0, sem="relaxed")
            tl.atomic_add(tally + 1, _count_bits(sees), mask=row == 0, sem="relaxed")

        m_chunk = tl.max(tl.reshape(m_block, [CHUNKS, PER_CHUNK, LANES]), 1)
        taken = (takes[None, :] >> (tl.arange(0, BLOCKS) // PER_TILE)[:, None]) & 1
        weight = tl.reshape(tl.where(taken != 0, l_block, 0.0), [CHUNKS, PER_CHUNK, LANES])
        gap = tl.reshape(m_block, [CHUNKS, PER_CHUNK, LANES]) - m_chunk[:, None, :]
        weight = tl.where(weight > 0, weight * tl.exp2(gap), 0.0)
        chunk = chunk0 + tl.arange(0, CHUNKS)
        tl.store(chunk_sum + lane_places(chunk[:, None]), tl.sum(weight, 1), mask=(chunk < finish)[:, None])

        needed = tl.reduce(takes, 0, _either)
        places = _places_of_bits(needed)
        count = _count_bits(needed)
        acc = tl.zeros([LANES, HEAD], tl.float32)
        for turn in tl.range(0, count * PER_TILE, num_stages=STAGES):
            i = tl.cast(turn, tl.int32)  # already is, unless interpreted
            nth = i // PER_TILE
            tile = ((places >> (4 * nth)) & 15).to(tl.int32)
            block = (chunk0 * (CHUNK // TILE) + tile) * PER_TILE + i % PER_TILE
            key = block * BLOCK + n
            step = block.to(tl.int64) * BLOCK
            value = tl.load(values + step * v_row, mask=(key < kv_end)[:, None] & (d < head_dim_v)[None, :], other=0.0)
            there = lane < tl.where((block >= block0) & (block < block1), rows, 0)
            p = tl.load(probabilities + step, mask=there[:, None], other=0.0)
            of_block = tl.load(item_blocks + lane_places(block), mask=there, other=float("-inf"))
            of_chunk = tl.load(item_max + lane_places(block // PER_CHUNK))
            added = acc + tl.dot(p, value) * tl.exp2(of_block - of_chunk)[:, None]
            # a lane that skips the tile must not even see a NaN of it
            use = (((takes >> tile) & 1) != 0) & (of_block > float("-inf"))
            acc = tl.where(use[:, None], added, acc)
            following = ((places >> (4 * nth + 4)) & 15).to(tl.int32)
            done = (nth + 1 == count) | (following // (CHUNK // TILE) != tile // (CHUNK // TILE))
            if done and i % PER_TILE == PER_TILE - 1:
                place = ((block // PER_CHUNK).to(tl.int64) * rows + lane) * HEAD
                tl.store(partial + place[:, None] + d[None, :], acc, mask=(lane < rows)[:, None])
                acc = tl.zeros([LANES, HEAD], tl.float32)
