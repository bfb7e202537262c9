"""Skipping schedules: the product with K always, the softmax and the product with V only for tiles that are kept.

`consume_skip` keeps the next tile's product with K in flight over the maximum, the vote and the branch; it is unrolled
by two, so that the two score buffers never move between registers. `consume_plain` has no overlap inside a warpgroup
and needs fewer registers: the other warpgroups fill the tensor cores. Both end every product with V inside its branch,
because one in flight across a merge of control flow makes ptxas serialise all of them. Inside it, the product of a
quarter of the tile's columns runs under the exponentials of the next quarter.
"""

from hopper_common import BLOCK_ROWS, DRIFT, arrive_warp, await_phase, ring_phase, ring_slot
from hopper_softmax import (
    clean_values,
    count_kept,
    decide,
    finite,
    first_maximum,
    halves,
    hide_columns,
    no_sums,
    outgrows,
    partial_maxima,
    rescale,
    rows_layout,
    scale_sums,
    scores_layout,
    soften,
    store_output,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def start_scores(call, shared, tile, GROUP: gl.constexpr):
    """Issues Q K^T of a tile."""
    slot = ring_slot(tile, call.K_STAGES)
    zeros = gl.full([BLOCK_ROWS, call.COLUMNS], 0.0, gl.float32, scores_layout(call.COLUMNS))
    await_phase(shared.k_full.index(slot), ring_phase(tile, call.K_STAGES))
    return warpgroup_mma(shared.q.index(GROUP), shared.k.index(slot).permute((1, 0)), zeros, use_acc=False,
                         is_async=True)  # fmt: skip


@gluon.jit
def finish_scores(call, shared, token, tile):
    scores = warpgroup_mma_wait(0, deps=(token,))
    arrive_warp(shared.k_free.index(ring_slot(tile, call.K_STAGES)))
    return scores


@gluon.jit
def use_tile(call, shared, scores, scale, maxima, keep, m, reference, sums, acc, kept, tile, DTYPE: gl.constexpr):
    """Softmax and product with V, if the tile is kept."""
    if keep > 0:
        await_phase(shared.v_full.index(ring_slot(tile, DRIFT)), ring_phase(tile, DRIFT))
        slot = ring_slot(tile, call.V_STAGES)
        rises = outgrows(maxima, reference)
        m = gl.maximum(m, gl.convert_layout(gl.max(maxima, 1), m.type.layout))
        if rises > 0:
            alpha = gl.exp2(reference - finite(m))
            sums = scale_sums(sums, alpha)
            acc = rescale(acc, alpha)
            reference = m
        shift = finite(reference)
        QUARTER: gl.constexpr = call.COLUMNS // 4
        low, high = halves(scores, scores_layout(2 * QUARTER))
        a, b = halves(low, scores_layout(QUARTER))
        c, d = halves(high, scores_layout(QUARTER))
        values = shared.v.index(slot)
        p, sums_a = soften(call, a, scale, shift, acc, DTYPE)
        token = warpgroup_mma(p, values.slice(0, QUARTER, dim=0), acc, is_async=True)
        p, sums_b = soften(call, b, scale, shift, acc, DTYPE)
        token = warpgroup_mma(p, values.slice(QUARTER, QUARTER, dim=0), token, is_async=True)
        p, sums_c = soften(call, c, scale, shift, acc, DTYPE)
        token = warpgroup_mma(p, values.slice(2 * QUARTER, QUARTER, dim=0), token, is_async=True)
        p, sums_d = soften(call, d, scale, shift, acc, DTYPE)
        token = warpgroup_mma(p, values.slice(3 * QUARTER, QUARTER, dim=0), token, is_async=True)
        sums += (sums_a + sums_b) + (sums_c + sums_d)
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
    maxima = partial_maxima(scores, call.COLUMNS) * call.scale_log2
    keep = decide(call, shared, maxima, m, item.log2_threshold, tile, GROUP)
    m, reference, sums, acc, kept = use_tile(
        call, shared, scores, call.scale_log2, maxima, keep, m, reference, sums, acc, kept, tile, DTYPE
    )
    following = finish_scores(call, shared, token, tile + 1)
    arrive_warp(shared.v_free.index(ring_slot(tile, DRIFT)))
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
        await_phase(shared.q_full.index(GROUP), sequence & 1)
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
        scores = hide_columns(scores, (item.tiles - 1) * call.COLUMNS, visible, call.COLUMNS)
        maxima = partial_maxima(scores, call.COLUMNS) * call.scale_log2
        keep = decide(call, shared, maxima, m, item.log2_threshold, last, GROUP)
        cleaned = clean_values(call, shared, item, last, cleaned, GROUP)
        m, reference, sums, acc, kept = use_tile(
            call, shared, scores, call.scale_log2, maxima, keep, m, reference, sums, acc, kept, last, DTYPE
        )
        arrive_warp(shared.v_free.index(ring_slot(last, DRIFT)))

        item = shared.read_item(sequence)
        store_output(call, shared, item, acc, reference, sums, DTYPE, GROUP, O_IN_Q)
        count_kept(call, item, kept, GROUP)
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
        await_phase(shared.q_full.index(GROUP), sequence & 1)
        for j in range(item.tiles):
            tile = base + j
            scores = finish_scores(call, shared, start_scores(call, shared, tile, GROUP), tile)
            if j >= whole:
                scores = hide_columns(scores, j * call.COLUMNS, visible, call.COLUMNS)
            maxima = partial_maxima(scores, call.COLUMNS) * call.scale_log2
            keep = decide(call, shared, maxima, m, item.log2_threshold, tile, GROUP)
            if j == item.tiles - 1:
                cleaned = clean_values(call, shared, item, tile, cleaned, GROUP)
            m, reference, sums, acc, kept = use_tile(
                call, shared, scores, call.scale_log2, maxima, keep, m, reference, sums, acc, kept, tile, DTYPE
            )
            arrive_warp(shared.v_free.index(ring_slot(tile, DRIFT)))

        if not O_IN_Q:
            arrive_warp(shared.q_free.index(GROUP))
        item = shared.read_item(sequence)
        store_output(call, shared, item, acc, reference, sums, DTYPE, GROUP, O_IN_Q)
        count_kept(call, item, kept, GROUP)
        shared.release_item(sequence)
        base += item.tiles
        sequence += 1
