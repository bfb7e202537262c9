"""Skipping schedules: the product with K always, the softmax and the product with V only for tiles that are kept.

`consume_skip` keeps the next tile's product with K in flight over the maximum, the vote and the branch; it is unrolled
by two, so that the two score buffers never move between registers. `consume_plain` has no overlap inside a warpgroup
and needs fewer registers: the other warpgroups fill the tensor cores. Both end every product with V inside its branch,
because one in flight across a merge of control flow makes ptxas serialise all of them.
"""

from hopper_common import BLOCK_ROWS, arrive_warp, ring_phase, ring_slot
from hopper_softmax import (
    add_counts,
    as_operand,
    clean_values,
    decide,
    existing_tiles,
    exponentials,
    first_maximum,
    hide_columns,
    no_sums,
    rows_layout,
    scores_layout,
    store_output,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def start_scores(call, shared, tile, GROUP: gl.constexpr):
    """Issues Q K^T of a tile."""
    slot = ring_slot(tile, call.STAGES)
    zeros = gl.full([BLOCK_ROWS, call.COLUMNS], 0.0, gl.float32, scores_layout(call.COLUMNS))
    mbarrier.wait(shared.k_full.index(slot), ring_phase(tile, call.STAGES))
    return warpgroup_mma(shared.q.index(GROUP), shared.k.index(slot).permute((1, 0)), zeros, use_acc=False,
                         is_async=True)  # fmt: skip


@gluon.jit
def finish_scores(call, shared, token, tile):
    scores = warpgroup_mma_wait(0, deps=(token,))
    arrive_warp(shared.k_free.index(ring_slot(tile, call.STAGES)))
    return scores


@gluon.jit
def use_tile(call, shared, scores, scale, tile_maximum, keep, m, reference, sums, acc, kept, slot, DTYPE: gl.constexpr):
    """Softmax and product with V, if the tile is kept."""
    if keep > 0:
        m = gl.maximum(m, tile_maximum)
        p, reference, sums, acc = exponentials(scores, scale, reference, m, sums, acc, call.COLUMNS)
        token = warpgroup_mma(as_operand(p, acc, DTYPE), shared.v.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(token,))
        kept += 1
    return m, reference, sums, acc, kept


@gluon.jit
def _step(call, shared, item, visible, scores, m, reference, sums, acc, kept, base, j, MASKED: gl.constexpr,
          GROUP: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """Tile j, with the scores of tile j + 1 computed meanwhile."""
    tile = base + j
    token = start_scores(call, shared, tile + 1, GROUP)
    if MASKED:
        scores = hide_columns(scores, j * call.COLUMNS, visible, call.COLUMNS)
    tile_maximum = gl.max(scores, 1) * call.scale_log2
    keep = decide(call, shared, tile_maximum, m, item.log2_threshold, tile, GROUP)
    slot = ring_slot(tile, call.STAGES)
    mbarrier.wait(shared.v_full.index(slot), ring_phase(tile, call.STAGES))
    m, reference, sums, acc, kept = use_tile(
        call, shared, scores, call.scale_log2, tile_maximum, keep, m, reference, sums, acc, kept, slot, DTYPE
    )
    following = finish_scores(call, shared, token, tile + 1)
    arrive_warp(shared.v_free.index(slot))
    return following, m, reference, sums, acc, kept


@gluon.jit
def consume_skip(call, shared, GROUP: gl.constexpr, DTYPE: gl.constexpr, O_IN_Q: gl.constexpr):
    """One consumer warpgroup: 64 rows of every item."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.HEAD, 16])
    sequence = 0
    base = 0
    cleaned = 0
    while shared.receive_item(sequence) != 0:
        item = shared.read_item(sequence)
        first_row = item.row0 + GROUP * BLOCK_ROWS
        rows = first_row + gl.arange(0, BLOCK_ROWS, rows_layout(call.COLUMNS))
        visible = item.visible_columns(call, rows)
        whole = item.visible_columns(call, first_row) // call.COLUMNS
        whole = gl.minimum(whole, item.tiles - 1)  # the last tile has its own step

        m = first_maximum(item, rows)
        reference = m
        sums = no_sums(call.COLUMNS)
        acc = gl.full([BLOCK_ROWS, call.HEAD], 0.0, gl.float32, ACC)
        kept = 0
        mbarrier.wait(shared.q_full.index(GROUP), sequence & 1)
        scores = finish_scores(call, shared, start_scores(call, shared, base, GROUP), base)
        for pair in range(whole // 2):
            odd, m, reference, sums, acc, kept = _step(
                call, shared, item, visible, scores, m, reference, sums, acc, kept, base, 2 * pair, False, GROUP, DTYPE
            )
            scores, m, reference, sums, acc, kept = _step(
                call, shared, item, visible, odd, m, reference, sums, acc, kept, base, 2 * pair + 1, False, GROUP, DTYPE
            )
        for j in range(whole // 2 * 2, item.tiles - 1):
            scores, m, reference, sums, acc, kept = _step(
                call, shared, item, visible, scores, m, reference, sums, acc, kept, base, j, True, GROUP, DTYPE
            )

        if not O_IN_Q:
            arrive_warp(shared.q_free.index(GROUP))
        last = base + item.tiles - 1
        slot = ring_slot(last, call.STAGES)
        scores = hide_columns(scores, (item.tiles - 1) * call.COLUMNS, visible, call.COLUMNS)
        tile_maximum = gl.max(scores, 1) * call.scale_log2
        keep = decide(call, shared, tile_maximum, m, item.log2_threshold, last, GROUP)
        mbarrier.wait(shared.v_full.index(slot), ring_phase(last, call.STAGES))
        cleaned = clean_values(call, shared, item, slot, cleaned, GROUP)
        m, reference, sums, acc, kept = use_tile(
            call, shared, scores, call.scale_log2, tile_maximum, keep, m, reference, sums, acc, kept, slot, DTYPE
        )
        arrive_warp(shared.v_free.index(slot))

        item = shared.read_item(sequence)
        store_output(call, shared, item, acc, reference, sums, DTYPE, GROUP, O_IN_Q)
        exist = existing_tiles(call, item, GROUP)
        add_counts(call, item, exist - kept, exist, GROUP)
        shared.release_item(sequence)
        base += item.tiles
        sequence += 1


@gluon.jit
def consume_plain(call, shared, GROUP: gl.constexpr, DTYPE: gl.constexpr, O_IN_Q: gl.constexpr):
    """As `consume_skip`, one tile after the other."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.HEAD, 16])
    sequence = 0
    base = 0
    cleaned = 0
    while shared.receive_item(sequence) != 0:
        item = shared.read_item(sequence)
        first_row = item.row0 + GROUP * BLOCK_ROWS
        rows = first_row + gl.arange(0, BLOCK_ROWS, rows_layout(call.COLUMNS))
        visible = item.visible_columns(call, rows)
        whole = item.visible_columns(call, first_row) // call.COLUMNS

        m = first_maximum(item, rows)
        reference = m
        sums = no_sums(call.COLUMNS)
        acc = gl.full([BLOCK_ROWS, call.HEAD], 0.0, gl.float32, ACC)
        kept = 0
        mbarrier.wait(shared.q_full.index(GROUP), sequence & 1)
        for j in range(item.tiles):
            tile = base + j
            slot = ring_slot(tile, call.STAGES)
            scores = finish_scores(call, shared, start_scores(call, shared, tile, GROUP), tile)
            if j >= whole:
                scores = hide_columns(scores, j * call.COLUMNS, visible, call.COLUMNS)
            tile_maximum = gl.max(scores, 1) * call.scale_log2
            keep = decide(call, shared, tile_maximum, m, item.log2_threshold, tile, GROUP)
            mbarrier.wait(shared.v_full.index(slot), ring_phase(tile, call.STAGES))
            if j == item.tiles - 1:
                cleaned = clean_values(call, shared, item, slot, cleaned, GROUP)
            m, reference, sums, acc, kept = use_tile(
                call, shared, scores, call.scale_log2, tile_maximum, keep, m, reference, sums, acc, kept, slot, DTYPE
            )
            arrive_warp(shared.v_free.index(slot))

        if not O_IN_Q:
            arrive_warp(shared.q_free.index(GROUP))
        item = shared.read_item(sequence)
        store_output(call, shared, item, acc, reference, sums, DTYPE, GROUP, O_IN_Q)
        exist = existing_tiles(call, item, GROUP)
        add_counts(call, item, exist - kept, exist, GROUP)
        shared.release_item(sequence)
        base += item.tiles
        sequence += 1
