"""Dense schedule: the product of tile j with K and of tile j-1 with V are in flight together (FlashAttention-3).

The softmax of tile j runs while the tensor cores compute P(j-1) V(j-1); the warpgroups take turns in issuing, so that
one computes exponentials while the other's products run. Exponents are relative to a reference that hardly ever changes
(`hopper_softmax`). At head sizes 64 and 128 nobody looks for a tile's maximum: exponentials are taken with the old
reference, and a row sum that is too large says that a score has outgrown it.
"""

from hopper_common import await_turn, give_turn
from hopper_queries import first_row, item_begun, last_scores_done, queries_again, receive_queries
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
from hopper_shared import arrive_warp, await_phase, read_item, receive_item, release_item
from hopper_softmax import (
    OUTGROWN,
    any_row_of_warp,
    count_all,
    first_maximum,
    halves,
    hide_columns,
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
def _divide(scores, COLUMNS: gl.constexpr):
    """The scores of a tile as two quarters and a half."""
    half, last = halves(scores, scores_layout(COLUMNS // 2))
    first, second = halves(half, scores_layout(COLUMNS // 4))
    return first, second, last


@gluon.jit
def _soften_all(call, first, second, last, shift, acc, DTYPE: gl.constexpr):
    """Exponentials of the three pieces, and their sums."""
    a, sums_a = soften(call, first, call.scale_log2, shift, acc, DTYPE)
    b, sums_b = soften(call, second, call.scale_log2, shift, acc, DTYPE)
    c, sums_c = soften(call, last, call.scale_log2, shift, acc, DTYPE)
    return a, b, c, sums_a + sums_b + sums_c


@gluon.jit
def _multiply(a, b, c, values, acc):
    """Issues P V, as three products."""
    QUARTER: gl.constexpr = a.shape[1]
    token = warpgroup_mma(a, values.slice(0, QUARTER, dim=0), acc, is_async=True)
    token = warpgroup_mma(b, values.slice(QUARTER, QUARTER, dim=0), token, is_async=True)
    return warpgroup_mma(c, values.slice(2 * QUARTER, 2 * QUARTER, dim=0), token, is_async=True)


@gluon.jit
def _start_scores(call, shared, queries, tile):
    """Issues Q K^T."""
    zeros = gl.full([call.ROWS, call.COLUMNS], 0.0, gl.float32, scores_layout(call.COLUMNS))
    k = shared.k.index(tile.slot)
    queries = queries_again(call, shared, queries)
    return warpgroup_mma(queries, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _issue(call, shared, queries, a, b, c, acc, before, tile):
    """Issues Q K^T of a tile and P V of the one before: the scores, and the output in flight."""
    await_phase(shared, key_full(call, tile), key_phase(call, tile))
    await_turn(shared.group)
    scores_token = _start_scores(call, shared, queries, tile)
    acc_token = _multiply(a, b, c, shared.v.index(value_slot(call, before)), acc)
    give_turn(gl.where(shared.group == call.GROUPS - 1, 0, shared.group + 1))
    scores = warpgroup_mma_wait(3, deps=(scores_token,))
    arrive_warp(shared, key_free(call, tile))
    return scores, acc_token


@gluon.jit
def _finish(call, shared, acc_token, before, tile):
    """Waits for the output of the tile before.

    The wait for V in front of it ends a basic block: what stands above, ptxas does not move behind the wait for the
    product.
    """
    await_phase(shared, value_full(call, tile), value_phase(call, tile))
    acc = warpgroup_mma_wait(0, deps=(acc_token,))
    arrive_warp(shared, value_free(call, before))
    return acc


@gluon.jit
def _step_speculative(call, shared, queries, visible, a, b, c, acc, reference, sums, before, tile, j,
                      MASKED: gl.constexpr, DTYPE: gl.constexpr):  # fmt: skip
    """One tile. Exponentials are taken with the old reference, and their sums tell whether a score has outgrown it.

    So nobody looks for the tile's maximum, unless it has.
    """
    scores, acc_token = _issue(call, shared, queries, a, b, c, acc, before, tile)
    if MASKED:
        scores = hide_columns(scores, j * call.COLUMNS, visible, call.COLUMNS)
    first, second, last = _divide(scores, call.COLUMNS)
    a, sums_a = soften(call, first, call.scale_log2, reference, acc, DTYPE)
    acc = _finish(call, shared, acc_token, before, tile)
    b, sums_b = soften(call, second, call.scale_log2, reference, acc, DTYPE)
    c, sums_c = soften(call, last, call.scale_log2, reference, acc, DTYPE)
    total = sums_a + sums_b + sums_c
    if any_row_of_warp(total > OUTGROWN) > 0:
        following = gl.maximum(reference, gl.max(scores, 1) * call.scale_log2)
        alpha = gl.exp2(reference - following)
        a, b, c, total = _soften_all(call, first, second, last, following, acc, DTYPE)
        acc = rescale(acc, alpha)
        sums = scale_sums(sums, alpha)
        reference = following
    return a, b, c, acc, reference, sums + total


@gluon.jit
def _step_checked(call, shared, queries, visible, a, b, c, acc, reference, sums, before, tile, j, MASKED: gl.constexpr,
                  DTYPE: gl.constexpr):  # fmt: skip
    """One tile. The reference is brought up to date first: at head size 256 faster than `_step_speculative`."""
    scores, acc_token = _issue(call, shared, queries, a, b, c, acc, before, tile)
    if MASKED:
        scores = hide_columns(scores, j * call.COLUMNS, visible, call.COLUMNS)
    rises = outgrows(partial_maxima(scores) * call.scale_log2, reference)
    following = reference
    if rises > 0:
        following = gl.maximum(reference, gl.max(scores, 1) * call.scale_log2)
    first, second, last = _divide(scores, call.COLUMNS)
    a, sums_a = soften(call, first, call.scale_log2, following, acc, DTYPE)
    b, sums_b = soften(call, second, call.scale_log2, following, acc, DTYPE)
    c, sums_c = soften(call, last, call.scale_log2, following, acc, DTYPE)
    acc = _finish(call, shared, acc_token, before, tile)
    if rises > 0:
        alpha = gl.exp2(reference - following)
        acc = rescale(acc, alpha)
        sums = scale_sums(sums, alpha)
    return a, b, c, acc, following, sums + (sums_a + sums_b + sums_c)


@gluon.jit
def _step(call, shared, queries, visible, a, b, c, acc, reference, sums, before, tile, j, MASKED: gl.constexpr,
          DTYPE: gl.constexpr, SPECULATIVE: gl.constexpr):  # fmt: skip
    step: gl.constexpr = _step_speculative if SPECULATIVE else _step_checked
    a, b, c, acc, reference, sums = step(
        call, shared, queries, visible, a, b, c, acc, reference, sums, before, tile, j, MASKED, DTYPE
    )
    return a, b, c, acc, reference, sums, tile, next_tile(call, tile)


@gluon.jit
def consume_dense(call, shared, DTYPE: gl.constexpr, SPECULATIVE: gl.constexpr):
    """One consumer warpgroup: its rows of every item."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.HEAD, 16])
    sequence = 0
    base = 0
    if shared.group == call.GROUPS - 1:
        give_turn(gl.to_tensor(0))
    while receive_item(call, shared, sequence) != 0:
        item = read_item(call, shared, sequence)
        first = first_row(call, item, shared.group)
        rows = first + gl.arange(0, call.ROWS, rows_layout(call.COLUMNS))
        visible = item.visible_columns(call, rows)
        whole = item.visible_columns(call, first) // call.COLUMNS  # tiles that need no mask

        first_tile = at_tile(call, base)
        queries = receive_queries(call, shared, sequence, shared.group)
        await_phase(shared, key_full(call, first_tile), key_phase(call, first_tile))
        scores = warpgroup_mma_wait(0, deps=(_start_scores(call, shared, queries, first_tile),))
        arrive_warp(shared, key_free(call, first_tile))
        item_begun(call, shared, sequence)
        if whole == 0:
            scores = hide_columns(scores, 0, visible, call.COLUMNS)
        acc = gl.full([call.ROWS, call.HEAD], 0.0, gl.float32, ACC)
        reference = gl.maximum(first_maximum(call, item, rows), gl.max(scores, 1) * call.scale_log2)
        first, second, last = _divide(scores, call.COLUMNS)
        a, b, c, sums = _soften_all(call, first, second, last, reference, acc, DTYPE)
        await_phase(shared, value_full(call, first_tile), value_phase(call, first_tile))

        before = first_tile
        tile = next_tile(call, first_tile)
        whole = gl.maximum(gl.minimum(whole, item.tiles), 1)
        for j in range(1, whole):
            a, b, c, acc, reference, sums, before, tile = _step(
                call, shared, queries, visible, a, b, c, acc, reference, sums, before, tile, j, False, DTYPE,
                SPECULATIVE,
            )  # fmt: skip
        for j in range(whole, item.tiles):
            a, b, c, acc, reference, sums, before, tile = _step(
                call, shared, queries, visible, a, b, c, acc, reference, sums, before, tile, j, True, DTYPE,
                SPECULATIVE,
            )  # fmt: skip

        last_scores_done(call, shared, sequence)
        base += item.tiles
        values = shared.v.index(value_slot(call, before))
        acc = warpgroup_mma_wait(0, deps=(_multiply(a, b, c, values, acc),))
        arrive_warp(shared, value_free(call, before))

        item = read_item(call, shared, sequence)
        store_output(call, shared, item, sequence, shared.group, acc, reference, sums, DTYPE)
        count_all(call, shared, item, shared.group)
        release_item(call, shared, sequence)
        sequence += 1
