"""Skipping schedules without overlap inside a warpgroup: fewer registers, and the others fill the tensor cores.

`consume_plain` is for heads of 256, whose output takes half of the registers. `consume_wide` is for calls with many
rows, in one of two ways: three warpgroups of 64 rows, for which there are registers because none holds the next tile's
scores; or, for decisions of 128 rows at heads of 64, two warpgroups that have all 128 rows of one, so that nobody waits
for another's vote, and what a tile costs beside its products is paid once for twice the rows. Those two take turns at
the exponentials, in every tile of an item, also one that they skip or do not compute: without, they fall into step.
"""

from hopper_common import await_turn, converged, end_block, give_turn
from hopper_queries import (
    first_row,
    hold_first,
    item_begun,
    last_scores_done,
    receive_queries,
    take_ticket,
    ticket_of,
)
from hopper_rings import (
    Tile,
    at_tile,
    key_free,
    key_full,
    key_phase,
    next_tile,
    value_free,
    value_full,
    value_phase,
    value_slot,
)
from hopper_shared import (
    arrive_warp,
    await_phase,
    await_unless,
    phase_over,
    read_item,
    receive_item,
    uniform,
)
from hopper_skip import (
    add_tile,
    begin_item,
    end_item,
    finish_scores,
    issue_scores,
    start_scores,
    use_tile,
)
from hopper_softmax import (
    hide_columns,
    outgrows,
    partial_maxima,
    tiles_seen,
)
from hopper_votes import decide, post_vote
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def consume_plain(call, shared, DTYPE: gl.constexpr):
    """One loop, for few registers: whether a tile needs a mask is asked at every tile."""
    sequence = 0
    base = 0
    while receive_item(call, shared, sequence) != 0:
        item = read_item(call, shared, sequence)
        visible, whole, m, sums, acc = begin_item(call, item, shared.group)
        reference = m
        kept = 0
        queries = receive_queries(call, shared, sequence, shared.group)
        item_begun(call, shared, sequence)
        for j in range(item.tiles):
            tile = at_tile(call, base + j)
            scores = finish_scores(call, shared, start_scores(call, shared, queries, tile), tile)
            if j >= whole:
                scores = hide_columns(scores, j * call.COLUMNS, visible, call.COLUMNS)
            maxima = partial_maxima(scores) * call.scale_log2
            keep = decide(call, shared, item, maxima, m, tile)
            m, reference, sums, acc, kept = use_tile(
                call, shared, scores, call.scale_log2, maxima, keep, m, reference, sums, acc, kept, tile, DTYPE
            )
            arrive_warp(shared, value_free(call, tile))

        last_scores_done(call, shared, sequence)
        end_item(call, shared, sequence, reference, sums, acc, kept, DTYPE)
        base += item.tiles
        sequence += 1


@gluon.jit
def _wide_step(call, shared, item, queries, keys, tile, m, reference, sums, acc, kept, base, visible, j,
               MASKED: gl.constexpr, COLUMNS: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """Tile j, or so many of its first columns. `keys`: its K is known to have arrived; returned for the next tile.

    Each question to a barrier takes longer than a branch on its answer, so they are asked while the warp waits anyhow:
    for V of this tile and K of the next one under the product with K. Whether the reference is outgrown is found out
    while the vote is counted.
    """
    TURNS: gl.constexpr = call.ROWS == 128
    tile = Tile(base + j, tile.slot, tile.place, tile.phase)  # the loop's counter: no number to carry
    await_unless(shared, keys, key_full(call, tile), key_phase(call, tile))
    token = issue_scores(call, shared, queries, tile, COLUMNS)
    if call.HEAD == 128:  # else ptxas puts what follows between the eight products; at 64, with four, 1 % slower
        end_block(tile.number)
    following = next_tile(call, tile)
    values = phase_over(shared, value_full(call, tile), value_phase(call, tile))
    keys = phase_over(shared, key_full(call, following), key_phase(call, following))
    scores = finish_scores(call, shared, token, tile)
    if MASKED:
        scores = hide_columns(scores, j * call.COLUMNS, visible, COLUMNS)
    maxima = partial_maxima(scores) * call.scale_log2
    keep = decide(call, shared, item, maxima, m, tile)
    rises = outgrows(maxima, reference)
    if keep > 0:
        await_unless(shared, values, value_full(call, tile), value_phase(call, tile))
        slot = value_slot(call, tile)  # before the branch in `add_tile`: 5 % (README.md)
        m, reference, sums, acc = add_tile(
            call, shared, scores, call.scale_log2, maxima, rises, m, reference, sums, acc, slot, DTYPE, TURNS
        )
        kept += 1
    elif TURNS:
        await_turn(shared.group)
        give_turn(1 - shared.group)
    arrive_warp(shared, value_free(call, tile))
    return keys, next_tile(call, tile), m, reference, sums, acc, kept


@gluon.jit
def _pass_tiles(call, shared, item, base, first):
    """Gives back what this warpgroup does not need: the item's tiles from `first` on.

    K is waited for all the same: its slot is free when every warpgroup has arrived for this tile, not for one before.
    """
    for j in range(first, item.tiles):
        tile = at_tile(call, base + j)
        await_phase(shared, key_full(call, tile), key_phase(call, tile))
        if call.ROWS == 128:
            await_turn(shared.group)
            give_turn(1 - shared.group)
        arrive_warp(shared, key_free(call, tile))
        if call.ON_DEMAND:
            post_vote(call, shared, 0, tile)
        arrive_warp(shared, value_free(call, tile))


@gluon.jit
def _half_seen(call, item, ticket, whole, tiles):
    """1 if no row of this warpgroup sees more than half of its last tile, as every second causal block of 64 rows.

    Then that half is all that is computed: the other adds zeros, so no bit changes. But NaN or Inf in V of keys that
    none of these rows sees does not reach them, where 0 * NaN of a whole kept tile would.
    """
    if call.CAUSAL and call.ROWS == 64:
        last_row = gl.minimum(first_row(call, item, ticket) + call.ROWS, item.q_end) - 1
        end = (tiles - 1) * call.COLUMNS + call.COLUMNS // 2
        return uniform(((item.visible_columns(call, last_row) <= end) & (tiles > whole)).to(gl.int32))
    else:
        return 0


@gluon.jit
def consume_wide(call, shared, DTYPE: gl.constexpr):
    """Tiles that are seen whole, those of which something is hidden, and those that this warpgroup does not need.

    Causality shows more to an item's last rows than to its first, and at the end of the sequence rows are missing. A
    tile of which a warpgroup sees nothing is not computed.

    Nothing in the loops but votes and `uniform` numbers decides a branch: where ptxas cannot see that all threads of a
    warp branch alike, it moves every operand address through vector registers.
    """
    sequence = 0
    base = 0
    take_ticket(call, shared, sequence)
    if call.ROWS == 128:  # noqa: SIM102 (the compiler decides the one, the kernel the other)
        if shared.group == 1:
            give_turn(gl.to_tensor(0))
    while receive_item(call, shared, sequence) != 0:
        item = read_item(call, shared, sequence)
        ticket = ticket_of(call, shared)
        visible, whole, m, sums, acc = begin_item(call, item, ticket)
        tiles = uniform(tiles_seen(call, item, first_row(call, item, ticket), call.ROWS))
        whole = gl.minimum(uniform(whole), tiles)
        reference = m
        kept = 0
        keys = gl.to_tensor(0)
        tile = at_tile(call, base)
        hold_first(call, item, ticket)
        queries = receive_queries(call, shared, sequence, ticket)
        item_begun(call, shared, sequence)
        for j in range(whole):
            keys, tile, m, reference, sums, acc, kept = _wide_step(
                call, shared, item, queries, keys, tile, m, reference, sums, acc, kept, base, visible, j, False,
                call.COLUMNS, DTYPE,
            )  # fmt: skip
        half = _half_seen(call, item, ticket, whole, tiles)
        for j in range(whole, tiles - half):
            keys, tile, m, reference, sums, acc, kept = _wide_step(
                call, shared, item, queries, keys, tile, m, reference, sums, acc, kept, base, visible, j, True,
                call.COLUMNS, DTYPE,
            )  # fmt: skip
        if half > 0:
            keys, tile, m, reference, sums, acc, kept = _wide_step(
                call, shared, item, queries, keys, tile, m, reference, sums, acc, kept, base, visible, tiles - 1, True,
                call.COLUMNS // 2, DTYPE,
            )  # fmt: skip
        converged()
        last_scores_done(call, shared, sequence)
        _pass_tiles(call, shared, item, base, tiles)
        end_item(call, shared, sequence, reference, sums, acc, kept, DTYPE)
        base += item.tiles
        sequence += 1
