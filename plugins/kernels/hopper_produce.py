"""The two producer warps: which work there is, in which order, and the streams of Q, K and V.

A CTA is persistent. One producer warp takes work items (one batch entry, one query head, one block of query rows) from
a counter in device memory, describes each to the others and streams Q and K through shared memory with the copy engine
(TMA); a second one streams V. Barriers live across items, so the loads of the next item overlap the last products and
the epilogue of the current one.
"""

from hopper_common import (
    ALWAYS_KEEP,
    HAS_COUNTER,
    HAS_KV_LENGTHS,
    HAS_Q_LENGTHS,
    HAS_Q_START,
    HAS_THRESHOLD_SCALE,
    RUN_WHERE_DENSE,
    RUN_WHERE_SPARSE,
    Item,
    last_item_row,
    three_skip_full,
)
from hopper_queries import load_queries
from hopper_rings import (
    at_tile,
    await_key_buffer,
    await_value_buffer,
    key_full,
    value_full,
    value_slot,
    voted_before,
)
from hopper_shared import arrive_warp, await_barrier, cell, publish_item, read_item, receive_item, release_item
from hopper_votes import any_vote, await_votes
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

DENSITY_ONE = gl.constexpr(256)  # share of tiles that are kept, as the producer of V follows it: all of them
DENSITY_DEMAND = gl.constexpr(40)  # below, V is loaded on demand,
DEMAND_KEYS = gl.constexpr(16384)  # in attention that is not causal only beyond so many keys


@gluon.jit
def log2_threshold(call, batch, kv_end):
    """log2 of the threshold of a batch entry; ALWAYS_KEEP where it is zero or means dense."""
    value = call.threshold
    if call.threshold_factor > 0:
        value = call.threshold_factor / kv_end.to(gl.float32)
    if call.has(HAS_THRESHOLD_SCALE):
        value = value * gl.load(call.threshold_scale)
    result = gl.to_tensor(ALWAYS_KEEP)
    if value > 0 and value < 1:
        result = gl.log2(value)
    return result


@gluon.jit
def unpack_item(call, index):
    """Order of the work: full attention head by head; causal longest block first within a section of heads.

    Causal blocks are counted from the end: what they have too many rows is missing in the first, which sees the least.
    """
    if call.CAUSAL:
        first = gl.minimum(index // (call.section * call.row_blocks) * call.section, call.last_section)
        width = gl.where(first == call.last_section, call.heads - first, call.section)
        place = index - first * call.row_blocks
        head = first + place % width
        block = call.row_blocks - 1 - place // width
    else:
        head = index // call.row_blocks
        block = index % call.row_blocks
    batch = head // call.heads_q
    ROWS: gl.constexpr = call.GROUPS * call.ROWS
    kv_end = call.seq_k
    q_end = call.seq_q
    q_start = call.seq_k - call.seq_q
    if call.has(HAS_KV_LENGTHS):
        kv_end = gl.maximum(gl.minimum(gl.load(call.kv_lengths + batch), kv_end), 0)
    if call.has(HAS_Q_LENGTHS):
        q_end = gl.minimum(gl.load(call.q_lengths + batch), q_end)
    if call.has(HAS_Q_START):
        q_start = gl.load(call.q_start + batch)
    row0 = block * ROWS
    if call.CAUSAL:
        row0 += call.first_row
    elif three_skip_full(call):
        row0 = gl.minimum(row0, last_item_row(call, q_end))
    threshold = log2_threshold(call, batch, kv_end)
    none = gl.to_tensor(0)
    item = Item(batch, head % call.heads_q, row0, q_end, q_start, kv_end, none, none, threshold)
    first = none
    if call.GENERAL and call.window > 0:
        first = gl.maximum(row0 + q_start - call.window + 1, 0) // call.COLUMNS
    end = gl.cdiv(item.visible_columns(call, gl.minimum(row0 + ROWS, q_end) - 1), call.COLUMNS)
    tiles = gl.where(row0 < q_end, gl.maximum(end - first, 1), 1)
    return Item(batch, head % call.heads_q, row0, q_end, q_start, kv_end, first, tiles, threshold)


@gluon.jit
def is_active(call, item):
    """Whether this launch computes the item, or the launch of the other kernel beside it."""
    dense = item.log2_threshold == ALWAYS_KEEP
    return not ((call.has(RUN_WHERE_DENSE) and not dense) or (call.has(RUN_WHERE_SPARSE) and dense))


@gluon.jit
def load_tile(desc, batch, head, row, full, slot, COLUMNS: gl.constexpr, HEAD: gl.constexpr):
    mbarrier.expect(full, COLUMNS * HEAD * 2)
    tma.async_load(desc, [batch, head, row, 0], full, slot)


@gluon.jit
def produce_keys(call, shared):
    """The first producer warp: hands out items, loads their Q and streams their K."""
    sequence = 0
    tile = 0  # tiles streamed so far, from which the place in the ring follows
    index = gl.program_id(0)
    items = call.heads * call.row_blocks
    while index < items:
        item = unpack_item(call, index)
        if is_active(call, item):
            publish_item(call, shared, sequence, 1, item)
            kv_head = item.head // call.group
            for j in range(item.tiles):
                place = at_tile(call, tile)
                await_key_buffer(call, shared, place)
                full = shared.barrier(key_full(call, place))
                load_tile(call.k, item.batch, kv_head, (item.first + j) * call.COLUMNS, full,
                          shared.k.index(place.slot), call.COLUMNS, call.HEAD)  # fmt: skip
                if j == 0:
                    load_queries(call, shared, item, sequence)
                tile += 1
            sequence += 1
        if call.has(HAS_COUNTER):
            index = gl.num_programs(0) + gl.atomic_add(call.counter, 1, sem="relaxed")
        else:
            index += gl.num_programs(0)
    publish_item(call, shared, sequence, 0, unpack_item(call, gl.to_tensor(0)))


@gluon.jit
def _needs_cleaning(call, item):
    """Whether the item's last tile has keys beyond `kv_lengths`."""
    end = item.kv_end - (item.first + item.tiles - 1) * call.COLUMNS
    return (end < call.COLUMNS) & (item.kv_end < call.seq_k)


@gluon.constexpr_function
def _zero_asm(columns, head):
    part = columns * 128  # bytes of 64 of the head's columns: rows of 128 bytes, each swizzled within itself
    stores = "".join(f" @more st.shared.v4.b32 [at+{n * part}], {{zero, zero, zero, zero}};" for n in range(head // 64))
    return (
        "{ .reg .b32 at, end, zero; .reg .pred more; mov.b32 zero, 0;"
        f" mov.u32 at, %laneid; shl.b32 at, at, 4; add.s32 at, at, $0; add.s32 end, $0, {part};"
        " mad.lo.s32 at, $1, 128, at;"
        f" again: setp.lt.u32 more, at, end;{stores} add.s32 at, at, 512; @more bra again; }}"
    )


@gluon.jit
def _load_clean(call, shared, item, kv_head, place, cleaned):
    """Loads V of the item's last tile and zeroes keys beyond `kv_lengths`: they may hold NaN, and 0 * NaN is NaN."""
    raw = shared.barrier(cell(call, "v_raw", 0))
    values = shared.v.index(value_slot(call, place))
    row = (item.first + item.tiles - 1) * call.COLUMNS
    load_tile(call.v, item.batch, kv_head, row, raw, values, call.COLUMNS, call.HEAD)
    await_barrier(shared, cell(call, "v_raw", 0), cleaned & 1)
    ASM: gl.constexpr = _zero_asm(call.COLUMNS, call.HEAD)
    gl.inline_asm(ASM, ("r", "r"), [values, gl.maximum(item.kv_end - row, 0)], (), is_pure=False)
    fence_async_shared()
    arrive_warp(shared, value_full(call, place))


@gluon.jit
def produce_values(call, shared):
    """The second producer warp: streams V, so that waiting for its buffers does not hold up K.

    ON_DEMAND, while few tiles are kept, V is loaded only when a warpgroup has voted to keep the tile: causal row blocks
    walk through K and V at different places, as those of long full attention come to do, and all of it is more than
    L2 delivers. While many tiles are kept, V is loaded early, for the latency. A tile that is not loaded completes its
    phase all the same, and no result changes.
    """
    sequence = 0
    tile = 0
    cleaned = 0  # tiles so far, from which the phase of their barrier follows
    density = gl.to_tensor(DENSITY_ONE)
    while receive_item(call, shared, sequence) != 0:
        item = read_item(call, shared, sequence)
        kv_head = item.head // call.group
        unclean = gl.where(_needs_cleaning(call, item), item.tiles - 1, -1)
        for j in range(item.tiles):
            place = at_tile(call, tile)
            await_value_buffer(call, shared, place)
            wanted = gl.to_tensor(1)
            if call.ON_DEMAND:
                before = voted_before(call, place)
                if before >= 0:
                    density += (any_vote(call, shared, at_tile(call, before)) * DENSITY_ONE - density) // 16
                if density < DENSITY_DEMAND and (call.CAUSAL or call.seq_k > DEMAND_KEYS):
                    await_votes(call, shared, place)
                    wanted = any_vote(call, shared, place)
            if wanted == 0:
                arrive_warp(shared, value_full(call, place))
            elif j == unclean:
                _load_clean(call, shared, item, kv_head, place, cleaned)
                cleaned += 1
            else:
                full = shared.barrier(value_full(call, place))
                load_tile(call.v, item.batch, kv_head, (item.first + j) * call.COLUMNS, full,
                          shared.v.index(value_slot(call, place)), call.COLUMNS, call.HEAD)  # fmt: skip
            tile += 1
        release_item(call, shared, sequence)
        sequence += 1
