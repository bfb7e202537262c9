"""Skipping schedule: the product with K always, the softmax and the product with V only for tiles that are kept.

The next tile's product with K is in flight over the maximum, the vote and the branch; the loop is unrolled by two, so
that the two score buffers never move between registers. Every product with V ends inside its branch, because one in
flight across a merge of control flow makes ptxas serialise all of them. Inside it, the product of some of the tile's
columns runs under the exponentials of the next (`hopper_product`). `hopper_plain` has the schedules without such
overlap.
"""

from hopper_common import give_turn
from hopper_product import await_products, multiply, multiply_with_ones
from hopper_queries import first_row, item_begun, last_scores_done, queries_again, receive_queries, ticket_of
from hopper_rings import (
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
from hopper_shared import arrive_warp, await_phase, read_item, receive_item, release_item, uniform
from hopper_softmax import (
    any_row_of_warp,
    count_kept,
    finite,
    first_maximum,
    hide_columns,
    no_sums,
    outgrows,
    partial_maxima,
    raised,
    rescale,
    rows_layout,
    scale_sums,
    scores_layout,
    store_output,
)
from hopper_votes import decide
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def start_scores(call, shared, queries, tile):
    """Issues Q K^T of a tile."""
    await_phase(shared, key_full(call, tile), key_phase(call, tile))
    return issue_scores(call, shared, queries, tile, call.COLUMNS)


@gluon.jit
def issue_scores(call, shared, queries, tile, COLUMNS: gl.constexpr):
    """The same for K that has arrived, and so many of its columns."""
    zeros = gl.full([call.ROWS, COLUMNS], 0.0, gl.float32, scores_layout(COLUMNS))
    k = shared.k.index(tile.slot)
    if COLUMNS < call.COLUMNS:
        k = k.slice(0, COLUMNS, dim=0)
    queries = queries_again(call, shared, queries)
    return warpgroup_mma(queries, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def finish_scores(call, shared, token, tile):
    scores = warpgroup_mma_wait(0, deps=(token,))
    arrive_warp(shared, key_free(call, tile))
    return scores


@gluon.jit
def use_tile(call, shared, scores, scale, maxima, keep, m, reference, sums, acc, kept, tile, DTYPE: gl.constexpr,
             TURNS: gl.constexpr = False):  # fmt: skip
    """Softmax and product with V, if the tile is kept."""
    if keep > 0:
        await_phase(shared, value_full(call, tile), value_phase(call, tile))
        slot = value_slot(call, tile)
        rises = outgrows(maxima, reference)
        m, reference, sums, acc = add_tile(
            call, shared, scores, scale, maxima, rises, m, reference, sums, acc, slot, DTYPE, TURNS
        )
        kept += 1
    return m, reference, sums, acc, kept


@gluon.jit
def add_tile(call, shared, scores, scale, maxima, rises, m, reference, sums, acc, slot, DTYPE: gl.constexpr,
             TURNS: gl.constexpr = False):  # fmt: skip
    """Softmax and product with V, which has arrived in that slot. `rises`: `outgrows` holds, for this warp."""
    if rises > 0:
        following = raised(m, maxima)
        alpha = gl.exp2(reference - finite(call, following))
        sums = scale_sums(sums, alpha)
        acc = rescale(acc, alpha)
        reference = following
    shift = finite(call, reference)
    if call.ONES:
        acc, sums = multiply_with_ones(call, shared, scores, scale, shift, slot, acc, sums, TURNS, DTYPE)
    else:
        product, total = multiply(call, shared, scores, scale, shift, slot, acc, DTYPE)
    m = raised(m, maxima)  # only now: what threads exchange for it travels under the products
    if call.ONES:
        acc, sums = await_products(call, acc, sums)
    else:
        acc = warpgroup_mma_wait(0, deps=(product,))
        sums += total
    return m, reference, sums, acc


@gluon.jit
def begin_item(call, item, ticket):
    """What each row sees, how many tiles all rows see whole, and the state before the first tile."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.HEAD, 16])
    first = first_row(call, item, ticket)
    rows = first + gl.arange(0, call.ROWS, rows_layout(call.COLUMNS))
    whole = item.visible_columns(call, first) // call.COLUMNS
    acc = gl.full([call.ROWS, call.HEAD], 0.0, gl.float32, ACC)
    return item.visible_columns(call, rows), whole, first_maximum(call, item, rows), no_sums(call), acc


@gluon.jit
def use_last_tile(call, shared, item, visible, scores, m, reference, sums, acc, kept, tile, tiles,
                  DTYPE: gl.constexpr):  # fmt: skip
    """The last of the `tiles` that this warpgroup computes: something of it may be hidden.

    Full attention asks whether anything is, because mostly nothing is: a mask has a quarter of a tile's instructions.
    """
    ASKS: gl.constexpr = not call.CAUSAL
    hidden = any_row_of_warp(visible < tiles * call.COLUMNS) if ASKS else 1
    if hidden > 0:
        scores = hide_columns(scores, (tiles - 1) * call.COLUMNS, visible, call.COLUMNS)
    maxima = partial_maxima(scores) * call.scale_log2
    keep = decide(call, shared, item, maxima, m, tile)
    m, reference, sums, acc, kept = use_tile(
        call, shared, scores, call.scale_log2, maxima, keep, m, reference, sums, acc, kept, tile, DTYPE
    )
    arrive_warp(shared, value_free(call, tile))
    return reference, sums, acc, kept


@gluon.jit
def end_item(call, shared, sequence, reference, sums, acc, kept, DTYPE: gl.constexpr):
    item = read_item(call, shared, sequence)
    ticket = ticket_of(call, shared)
    store_output(call, shared, item, sequence, ticket, acc, reference, sums, DTYPE)
    count_kept(call, shared, item, ticket, kept)
    release_item(call, shared, sequence)


@gluon.jit
def _step(call, shared, item, queries, scores, m, reference, sums, acc, kept, base, visible, j, MASKED: gl.constexpr,
          TURNS: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """Tile j, with the scores of tile j + 1 computed meanwhile."""
    tile = at_tile(call, base + j)
    token = start_scores(call, shared, queries, next_tile(call, tile))
    if MASKED:
        scores = hide_columns(scores, j * call.COLUMNS, visible, call.COLUMNS)
    maxima = partial_maxima(scores) * call.scale_log2
    keep = decide(call, shared, item, maxima, m, tile)
    m, reference, sums, acc, kept = use_tile(
        call, shared, scores, call.scale_log2, maxima, keep, m, reference, sums, acc, kept, tile, DTYPE, TURNS
    )
    following = finish_scores(call, shared, token, next_tile(call, tile))
    arrive_warp(shared, value_free(call, tile))
    return following, m, reference, sums, acc, kept


@gluon.jit
def _pairs(call, shared, item, queries, scores, m, reference, sums, acc, kept, base, visible, whole,
           TURNS: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """The first tiles, all but an odd one of the `whole` that need no mask."""
    for pair in range(whole // 2):
        odd, m, reference, sums, acc, kept = _step(
            call, shared, item, queries, scores, m, reference, sums, acc, kept, base, visible, 2 * pair, False, TURNS,
            DTYPE,
        )  # fmt: skip
        scores, m, reference, sums, acc, kept = _step(
            call, shared, item, queries, odd, m, reference, sums, acc, kept, base, visible, 2 * pair + 1, False, TURNS,
            DTYPE,
        )  # fmt: skip
    return scores, m, reference, sums, acc, kept


@gluon.jit
def consume_skip(call, shared, DTYPE: gl.constexpr):
    """One consumer warpgroup: its rows of every item.

    Two that decide together keep the same tiles and fall into step: both take their exponentials at the same time, then
    both wait for their products. So they take turns at the exponentials, in a CTA's first item and behind one in which
    they kept all pairs of tiles that need no mask, or had none. Where tiles are skipped each waits for the other's vote
    anyhow, and turns cost more than they bring (README.md).
    """
    sequence = 0
    base = 0
    in_turn = gl.to_tensor(1)
    if call.JOINT:  # noqa: SIM102 (the compiler decides the one, the kernel the other)
        if shared.group == 1:
            give_turn(gl.to_tensor(0))
    while receive_item(call, shared, sequence) != 0:
        item = read_item(call, shared, sequence)
        visible, whole, m, sums, acc = begin_item(call, item, shared.group)
        reference = m
        kept = 0
        whole = gl.minimum(whole, item.tiles - 1)  # the last tile has its own step
        queries = receive_queries(call, shared, sequence, shared.group)
        first = at_tile(call, base)
        scores = finish_scores(call, shared, start_scores(call, shared, queries, first), first)
        item_begun(call, shared, sequence)
        if call.JOINT:
            # the same for both, or turns would be taken by one of them alone
            whole = uniform(gl.minimum(item.visible_columns(call, item.row0) // call.COLUMNS, item.tiles - 1))
            if in_turn > 0:
                scores, m, reference, sums, acc, kept = _pairs(
                    call, shared, item, queries, scores, m, reference, sums, acc, kept, base, visible, whole, True,
                    DTYPE,
                )  # fmt: skip
            else:
                scores, m, reference, sums, acc, kept = _pairs(
                    call, shared, item, queries, scores, m, reference, sums, acc, kept, base, visible, whole, False,
                    DTYPE,
                )  # fmt: skip
            in_turn = uniform((kept == whole // 2 * 2).to(gl.int32))
        else:
            scores, m, reference, sums, acc, kept = _pairs(
                call, shared, item, queries, scores, m, reference, sums, acc, kept, base, visible, whole, False, DTYPE
            )
        for j in range(whole // 2 * 2, item.tiles - 1):
            scores, m, reference, sums, acc, kept = _step(
                call, shared, item, queries, scores, m, reference, sums, acc, kept, base, visible, j, True, False,
                DTYPE,
            )  # fmt: skip

        last_scores_done(call, shared, sequence)
        last = at_tile(call, base + item.tiles - 1)
        reference, sums, acc, kept = use_last_tile(
            call, shared, item, visible, scores, m, reference, sums, acc, kept, last, item.tiles, DTYPE
        )
        end_item(call, shared, sequence, reference, sums, acc, kept, DTYPE)
        base += item.tiles
        sequence += 1
