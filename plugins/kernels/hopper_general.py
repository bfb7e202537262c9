"""General schedule: soft-cap, window, additive bias or boolean mask; every tile is masked element by element.

Slower than the others and complete: whatever the specialised kernels leave out runs here, with the same decisions.
"""

from hopper_common import HAS_ADDITIVE_BIAS, HAS_BOOL_BIAS, HAS_COUNTS
from hopper_queries import first_row, item_begun, last_scores_done, receive_queries
from hopper_rings import at_tile, value_free
from hopper_shared import arrive_warp, read_item, receive_item, release_item
from hopper_skip import finish_scores, start_scores, use_tile
from hopper_softmax import (
    add_counts,
    first_maximum,
    for_shares,
    hide_columns,
    no_sums,
    partial_maxima,
    rows_layout,
    scores_layout,
    store_output,
)
from hopper_votes import any_row, joint_vote, post_vote
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _logits(call, item, scores, rows, visible, column0, DTYPE: gl.constexpr):
    """Scores in log2 units with everything applied that changes or hides them."""
    if call.softcap_log2 > 0:
        scores = call.softcap_log2 * (1.0 - 2.0 / (gl.exp2(scores * call.softcap_rate) + 1.0))
    else:
        scores = scores * call.scale_log2
    columns = column0 + gl.arange(0, call.COLUMNS, gl.SliceLayout(0, scores_layout(call.COLUMNS)))
    if call.has(HAS_ADDITIVE_BIAS | HAS_BOOL_BIAS):
        offset = item.batch.to(gl.int64) * call.bias_batch + item.head.to(gl.int64) * call.bias_head
        offsets = offset + rows.to(gl.int64)[:, None] * call.bias_row + columns.to(gl.int64)[None, :] * call.bias_column
        inside = (rows < call.seq_q)[:, None] & (columns < call.seq_k)[None, :]
        if call.has(HAS_BOOL_BIAS):
            attend = gl.load(call.bias_bool + offsets, mask=inside, other=0)
            scores = gl.where(attend != 0, scores, float("-inf"))
        else:
            HIDDEN: gl.constexpr = -32752.0 if gl.float16 == DTYPE else -1.6947657e38  # finfo(dtype).min / 2
            bias = gl.load(call.bias + offsets, mask=inside, other=0.0).to(gl.float32)
            scores = gl.where(bias > HIDDEN, scores + bias * LOG2_E, float("-inf"))
    if call.window > 0:
        oldest = rows + item.q_start - call.window
        scores = gl.where(columns[None, :] > oldest[:, None], scores, float("-inf"))
    return hide_columns(scores, column0, visible, call.COLUMNS)


@gluon.jit
def consume_general(call, shared, DTYPE: gl.constexpr):
    """One consumer warpgroup: its rows of every item."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.HEAD, 16])
    sequence = 0
    base = 0
    while receive_item(call, shared, sequence) != 0:
        item = read_item(call, shared, sequence)
        rows = first_row(call, item, shared.group) + gl.arange(0, call.ROWS, rows_layout(call.COLUMNS))
        visible = item.visible_columns(call, rows)

        m = first_maximum(call, item, rows)
        reference = m
        sums = no_sums(call)
        acc = gl.full([call.ROWS, call.HEAD], 0.0, gl.float32, ACC)
        kept = 0
        exist = 0
        queries = receive_queries(call, shared, sequence, shared.group)
        item_begun(call, shared, sequence)
        for j in range(item.tiles):
            tile = at_tile(call, base + j)
            scores = finish_scores(call, shared, start_scores(call, shared, queries, tile), tile)
            scores = _logits(call, item, scores, rows, visible, (item.first + j) * call.COLUMNS, DTYPE)
            maxima = partial_maxima(scores)
            keep = any_row(shared, maxima - for_shares(m, maxima) >= item.log2_threshold)
            if call.JOINT:
                post_vote(call, shared, keep, at_tile(call, 2 * tile.number))
                keep = joint_vote(call, shared, keep, at_tile(call, 2 * tile.number))
            if call.has(HAS_COUNTS):
                exists = for_shares(rows, maxima) < item.q_end
                sees = any_row(shared, (maxima > float("-inf")) & exists)
                if call.JOINT:
                    post_vote(call, shared, sees, at_tile(call, 2 * tile.number + 1))
                    sees = joint_vote(call, shared, sees, at_tile(call, 2 * tile.number + 1))
                exist += sees
            m, reference, sums, acc, kept = use_tile(
                call, shared, scores, 1.0, maxima, keep, m, reference, sums, acc, kept, tile, DTYPE
            )
            arrive_warp(shared, value_free(call, tile))

        last_scores_done(call, shared, sequence)
        item = read_item(call, shared, sequence)
        store_output(call, shared, item, sequence, shared.group, acc, reference, sums, DTYPE)
        if call.has(HAS_COUNTS):
            add_counts(call, shared, item, exist - kept, exist)
        release_item(call, shared, sequence)
        base += item.tiles
        sequence += 1
