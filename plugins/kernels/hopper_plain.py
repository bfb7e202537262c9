"""Skipping schedules without overlap inside a warpgroup: fewer registers, and the others fill the tensor cores.

`consume_plain` is for heads of 256, whose output takes half of the registers. `consume_wide` is for calls with many
rows, in one of two ways: three warpgroups of 64 rows, for which there are registers because none holds the next tile's
scores; or, for decisions of 128 rows at heads of 64, two warpgroups that have all 128 rows of one, so that nobody waits
for another's vote, and what a tile costs beside its products is paid once for twice the rows.
"""

from hopper_common import arrive_warp, await_phase, await_unless, end_block, phase_over
from hopper_queries import item_begun, last_scores_done, receive_queries
from hopper_rings import key_free, key_full, key_phase, value_free, value_full, value_phase, value_slot
from hopper_skip import (
    add_tile,
    begin_item,
    end_item,
    finish_scores,
    issue_scores,
    start_scores,
    use_last_tile,
    use_tile,
)
from hopper_softmax import clean_values, decide, hide_columns, outgrows, partial_maxima, post_vote, tiles_seen
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def consume_plain(call, shared, GROUP: gl.constexpr, DTYPE: gl.constexpr):
    """One loop, for few registers: whether a tile needs a mask is asked at every tile."""
    sequence = 0
    base = 0
    cleaned = 0
    while shared.receive_item(sequence) != 0:
        item = shared.read_item(sequence)
        visible, whole, m, sums, acc = begin_item(call, item, GROUP)
        reference = m
        kept = 0
        queries = receive_queries(call, shared, sequence, GROUP)
        item_begun(call, shared, sequence, GROUP)
        for j in range(item.tiles):
            tile = base + j
            scores = finish_scores(call, shared, start_scores(call, shared, queries, tile), tile)
            if j >= whole:
                scores = hide_columns(scores, j * call.COLUMNS, visible, call.COLUMNS)
            maxima = partial_maxima(scores) * call.scale_log2
            keep = decide(call, shared, maxima, m, item.log2_threshold, tile, GROUP)
            if j == item.tiles - 1:
                cleaned = clean_values(call, shared, item, tile, cleaned, GROUP)
            m, reference, sums, acc, kept = use_tile(
                call, shared, scores, call.scale_log2, maxima, keep, m, reference, sums, acc, kept, tile, DTYPE
            )
            arrive_warp(value_free(call, shared, tile))

        last_scores_done(call, shared, sequence, GROUP)
        end_item(call, shared, sequence, reference, sums, acc, kept, DTYPE, GROUP)
        base += item.tiles
        sequence += 1


@gluon.jit
def _wide_step(call, shared, item, queries, keys, m, reference, sums, acc, kept, base, visible, j, MASKED: gl.constexpr,
               GROUP: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """Tile j. `keys`: its K is known to have arrived; returned for the next tile.

    Each question to a barrier takes longer than a branch on its answer, so they are asked while the warp waits anyhow:
    for V of this tile and K of the next one under the product with K. Whether the reference is outgrown is found out
    while the vote is counted.
    """
    tile = base + j
    await_unless(keys, key_full(call, shared, tile), key_phase(call, tile))
    token = issue_scores(call, shared, queries, tile)
    if call.HEAD == 128:  # else ptxas puts what follows between the eight products; at 64, with four, 1 % slower
        end_block(tile)
    values = phase_over(value_full(call, shared, tile), value_phase(call, tile))
    keys = phase_over(key_full(call, shared, tile + 1), key_phase(call, tile + 1))
    scores = finish_scores(call, shared, token, tile)
    if MASKED:
        scores = hide_columns(scores, j * call.COLUMNS, visible, call.COLUMNS)
    maxima = partial_maxima(scores) * call.scale_log2
    keep = decide(call, shared, maxima, m, item.log2_threshold, tile, GROUP)
    rises = outgrows(maxima, reference)
    if keep > 0:
        await_unless(values, value_full(call, shared, tile), value_phase(call, tile))
        slot = value_slot(call, tile)  # before the branch in `add_tile`: 5 % (README.md)
        m, reference, sums, acc = add_tile(
            call, shared, scores, call.scale_log2, maxima, rises, m, reference, sums, acc, slot, DTYPE
        )
        kept += 1
    arrive_warp(value_free(call, shared, tile))
    return keys, m, reference, sums, acc, kept


@gluon.jit
def _pass_tiles(call, shared, item, base, first, cleaned, GROUP: gl.constexpr):
    """Gives back what this warpgroup does not need: the item's tiles from `first` on.

    K is waited for all the same: its slot is free when every warpgroup has arrived for this tile, not for one before.
    """
    for j in range(first, item.tiles):
        tile = base + j
        await_phase(key_full(call, shared, tile), key_phase(call, tile))
        arrive_warp(key_free(call, shared, tile))
        if call.ON_DEMAND:
            post_vote(call, shared, 0, tile, GROUP)
        if j == item.tiles - 1:
            cleaned = clean_values(call, shared, item, tile, cleaned, GROUP)
        arrive_warp(value_free(call, shared, tile))
    return cleaned


@gluon.jit
def consume_wide(call, shared, GROUP: gl.constexpr, DTYPE: gl.constexpr):
    """A loop for tiles that every row of the warpgroup sees whole, one for the others, the last, and those beyond.

    Causality shows more to an item's last rows than to its first, and at the end of the sequence rows are missing. A
    tile of which a warpgroup sees nothing is not computed, unless it is the first.

    Nothing in the first but the vote decides a branch: where ptxas cannot see that all threads of a warp branch alike,
    it moves every operand address through vector registers.
    """
    sequence = 0
    base = 0
    cleaned = 0
    while shared.receive_item(sequence) != 0:
        item = shared.read_item(sequence)
        visible, whole, m, sums, acc = begin_item(call, item, GROUP)
        tiles = gl.maximum(tiles_seen(call, item, item.row0 + GROUP * call.ROWS, call.ROWS), 1)
        whole = gl.minimum(whole, tiles - 1)  # the last tile has its own step
        reference = m
        kept = 0
        keys = gl.to_tensor(0)
        queries = receive_queries(call, shared, sequence, GROUP)
        item_begun(call, shared, sequence, GROUP)
        for j in range(whole):
            keys, m, reference, sums, acc, kept = _wide_step(
                call, shared, item, queries, keys, m, reference, sums, acc, kept, base, visible, j, False, GROUP, DTYPE
            )
        for j in range(whole, tiles - 1):
            keys, m, reference, sums, acc, kept = _wide_step(
                call, shared, item, queries, keys, m, reference, sums, acc, kept, base, visible, j, True, GROUP, DTYPE
            )
        last = base + tiles - 1
        scores = finish_scores(call, shared, start_scores(call, shared, queries, last), last)
        last_scores_done(call, shared, sequence, GROUP)
        reference, sums, acc, kept, cleaned = use_last_tile(
            call, shared, item, visible, scores, m, reference, sums, acc, kept, cleaned, last, tiles, GROUP, DTYPE
        )
        cleaned = _pass_tiles(call, shared, item, base, tiles, cleaned, GROUP)
        end_item(call, shared, sequence, reference, sums, acc, kept, DTYPE, GROUP)
        base += item.tiles
        sequence += 1
