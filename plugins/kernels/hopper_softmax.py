"""Pieces of the online softmax in registers: layouts, tile decisions, one update, the epilogue.

Scores are kept in log2 units (scores * scale * log2(e)). A thread holds parts of two rows; row sums stay per thread
until the epilogue, so that no shuffle is paid per tile for them.

Exponents are relative to a `reference`: the running maximum, or one that follows it only when it is LAG behind, because
multiplying the output costs as much as a quarter of a tile's softmax and in most tiles no maximum rises. What is summed
and what is multiplied with V carry the same factor, so nothing but rounding changes. Decisions use the true maximum.
"""

from hopper_common import (
    BLOCK_ROWS,
    COUNTS_128_ROWS,
    HAS_COUNTS,
    HAS_LSE,
    HAS_SINKS,
    NEVER_VOTES,
    TILE_COLUMNS,
    VOTE_SLOTS,
    arrive_warp,
    ring_phase,
    ring_slot,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

LAG = gl.constexpr(8.0)  # log2 units a reference may lag behind: probabilities stay below 2**8, fit for float16
VOTE_BARRIER = gl.constexpr(8)  # first named barrier of the votes, above those Triton uses


@gluon.constexpr_function
def scores_layout(columns):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def rows_layout(columns):
    return gl.SliceLayout(1, scores_layout(columns))


@gluon.constexpr_function
def _vote_asm(barrier):
    # a thread holds two of the warpgroup's 64 rows
    return (
        "{ .reg .pred wanted; .reg .b32 any; or.b32 any, $1, $2; setp.ne.b32 wanted, any, 0;"
        f" barrier.cta.red.or.pred wanted, {barrier}, 128, wanted; selp.s32 $0, 1, 0, wanted; }}"
    )


@gluon.jit
def any_row(wants, GROUP: gl.constexpr):
    """1 if `wants` (bool per row) holds for some row of this warpgroup, else 0: one hardware barrier with a vote."""
    ASM: gl.constexpr = _vote_asm(VOTE_BARRIER + GROUP)
    return gl.inline_asm(ASM, ("=r", "r"), [wants.to(gl.int32)], gl.int32, is_pure=False)


@gluon.jit
def joint_vote(shared, own, tile, GROUP: gl.constexpr):
    """Joins the votes of two warpgroups that share a row block, so that it is kept if either wants it.

    The own vote is published and, where it already says keep, nothing is waited for: the warpgroups fall into step only
    at tiles that are about to be skipped, where there is no work to stagger.
    """
    slot = ring_slot(tile, VOTE_SLOTS)
    gl.inline_asm(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %tid.x; and.b32 lane, lane, 127;"
        " setp.eq.u32 first, lane, 0; @first st.shared.b32 [$0], $1;"
        " @first mbarrier.arrive.shared::cta.b64 _, [$2]; }",
        ("r", "r", "r"),
        [shared.votes.index(GROUP * VOTE_SLOTS + slot), own, shared.voted.index(GROUP * VOTE_SLOTS + slot)],
        (), is_pure=False,
    )  # fmt: skip
    keep = own
    if own == 0:
        other = (1 - GROUP) * VOTE_SLOTS + slot
        mbarrier.wait(shared.voted.index(other), ring_phase(tile, VOTE_SLOTS))
        keep = gl.inline_asm("ld.shared.b32 $0, [$1];", ("=r", "r"), [shared.votes.index(other)], gl.int32,
                             is_pure=False)  # fmt: skip
    return keep


@gluon.jit
def decide(call, shared, tile_maximum, m, log2_threshold, tile, GROUP: gl.constexpr):
    """1 if the tile is kept. `tile` counts every tile of the CTA, so that a vote slot is not reused too early."""
    keep = any_row(tile_maximum - m >= log2_threshold, GROUP)
    if call.JOINT:
        keep = joint_vote(shared, keep, tile, GROUP)
    return keep


@gluon.jit
def partial_sums(p, COLUMNS: gl.constexpr):
    """Row sums over the columns a thread holds: `[rows, 4]`, one per thread of a quad."""
    return gl.sum(gl.sum(gl.reshape(p, [BLOCK_ROWS, COLUMNS // 8, 4, 2]), 3), 1)


@gluon.jit
def no_sums(COLUMNS: gl.constexpr):
    return partial_sums(gl.full([BLOCK_ROWS, COLUMNS], 0.0, gl.float32, scores_layout(COLUMNS)), COLUMNS)


@gluon.jit
def any_row_of_warp(wants):
    """1 if `wants` (bool per row) holds for some row of this warp, else 0."""
    return gl.inline_asm(
        "{ .reg .pred wanted; .reg .b32 any; or.b32 any, $1, $2; setp.ne.b32 wanted, any, 0;"
        " vote.sync.any.pred wanted, wanted, 0xffffffff; selp.s32 $0, 1, 0, wanted; }",
        ("=r", "r"), [wants.to(gl.int32)], gl.int32, is_pure=False,
    )  # fmt: skip


@gluon.jit
def probabilities(scores, scale, reference):
    """2 ** (scores - reference), and what the reference counts as for rows that have seen nothing yet."""
    shift = gl.where(reference == float("-inf"), 0.0, reference)  # -inf - -inf would be NaN
    return gl.exp2(scores * scale - shift[:, None]), shift


@gluon.jit
def scale_sums(sums, alpha):
    SUMS: gl.constexpr = sums.type.layout
    return sums * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]


@gluon.jit
def rescale(acc, alpha):
    ACC: gl.constexpr = acc.type.layout
    return acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]


@gluon.jit
def exponentials(scores, scale, reference, m, sums, acc, COLUMNS: gl.constexpr):
    """One online-softmax update with the running maximum `m`: `(p, reference, sums, acc)`."""
    if any_row_of_warp(m - reference > LAG) > 0:
        shift = gl.where(m == float("-inf"), 0.0, m)
        alpha = gl.exp2(reference - shift)
        sums = scale_sums(sums, alpha)
        acc = rescale(acc, alpha)
        reference = m
    p, _ = probabilities(scores, scale, reference)
    return p, reference, sums + partial_sums(p, COLUMNS), acc


@gluon.jit
def as_operand(p, acc, DTYPE: gl.constexpr):
    """Probabilities as the register operand of the product with V; same registers, no data movement."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return gl.convert_layout(p.to(DTYPE), OPERAND)


@gluon.jit
def hide_columns(scores, column0, visible, COLUMNS: gl.constexpr):
    """-inf where the column is not below the row's number of visible columns."""
    columns = column0 + gl.arange(0, COLUMNS, gl.SliceLayout(0, scores_layout(COLUMNS)))
    return gl.where(columns[None, :] < visible[:, None], scores, float("-inf"))


@gluon.jit
def first_maximum(item, rows):
    """Running maximum before the first tile: -inf, and for rows that do not exist a value that never votes."""
    return gl.where(rows < item.q_end, float("-inf"), NEVER_VOTES)


@gluon.jit
def clean_values(call, shared, item, slot, cleaned, GROUP: gl.constexpr):
    """Zeroes V of keys beyond kv_lengths in the item's last tile: they may hold NaN, and 0 * NaN is NaN.

    The first warpgroup does it, the others wait. It may be an item ahead of them (items of one tile), hence two
    barriers in turn. Returns the number of cleanings so far, from which barrier and phase follow.
    """
    end = item.kv_end - (item.first + item.tiles - 1) * call.COLUMNS
    if end < call.COLUMNS and item.kv_end < call.seq_k:
        if GROUP == 0:
            CHUNK: gl.constexpr = 16
            LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            rows = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))
            for c in gl.static_range(call.COLUMNS // CHUNK):
                if c * CHUNK + CHUNK > end:
                    part = shared.v.index(slot).slice(c * CHUNK, CHUNK, dim=0)
                    value = part.load(LAYOUT)
                    part.store(gl.where((c * CHUNK + rows < end)[:, None], value, 0.0))
            fence_async_shared()
            arrive_warp(shared.v_clean.index(ring_slot(cleaned, 2)))
        mbarrier.wait(shared.v_clean.index(ring_slot(cleaned, 2)), ring_phase(cleaned, 2))
        cleaned += 1
    return cleaned


@gluon.jit
def store_output(
    call, shared, item, acc, reference, sums, DTYPE: gl.constexpr, GROUP: gl.constexpr, O_IN_Q: gl.constexpr
):
    """Normalises and writes 64 rows; the copy engine clips what lies beyond the tensor."""
    ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    rows = item.row0 + GROUP * BLOCK_ROWS + gl.arange(0, BLOCK_ROWS, rows_layout(call.COLUMNS))
    total = gl.convert_layout(gl.sum(sums, 1), rows.type.layout)
    if call.has(HAS_LSE):
        value = gl.where(total > 0, (reference + gl.log2(total)) * 0.6931471805599453, float("-inf"))
        place = (item.batch * call.heads_q + item.head).to(gl.int64) * call.seq_q
        value = gl.where(rows < item.q_end, value, float("-inf"))
        gl.store(call.lse + place + rows, value, mask=rows < call.seq_q)
    weight = total
    if call.has(HAS_SINKS):
        sink = gl.load(call.sinks + item.head).to(gl.float32) * 1.4426950408889634
        weight = total + gl.exp2(sink - reference)
    weight = gl.where((total > 0) & (rows < item.q_end), 1.0 / weight, 0.0)
    weight = gl.convert_layout(weight, ROWS)[:, None]
    # a row without weight is zero whatever a NaN in V made of its sum
    out = gl.where(weight == 0.0, 0.0, acc * weight).to(DTYPE)
    if O_IN_Q:
        stage = shared.q.index(GROUP)
    else:
        stage = shared.o.index(GROUP)
        tma.store_wait(0)  # the previous item's rows have left the buffer
    stage.store(out)
    fence_async_shared()
    tma.async_store(call.o, [item.batch, item.head, item.row0 + GROUP * BLOCK_ROWS, 0], stage)
    if O_IN_Q:
        tma.store_wait(0)
        arrive_warp(shared.q_free.index(GROUP))


@gluon.jit
def existing_tiles(call, item, GROUP: gl.constexpr):
    """Tiles in which some row of the decision that begins with this warpgroup's rows sees something.

    For kernels in which what a row sees is a number of columns. 0 where no decision begins with these rows.
    """
    first = item.row0 + GROUP * BLOCK_ROWS
    rows = gl.where(call.has(COUNTS_128_ROWS), 2 * BLOCK_ROWS, BLOCK_ROWS)
    last = gl.minimum(first + rows, item.q_end) - 1
    tiles = gl.cdiv(item.visible_columns(call, last), TILE_COLUMNS)
    return gl.where((first % rows == 0) & (last >= first), tiles, 0)


@gluon.jit
def add_counts(call, item, skipped, exist, GROUP: gl.constexpr):
    if call.has(HAS_COUNTS):
        write = (exist > 0) & ((not call.JOINT) or GROUP == 0)
        gl.atomic_add(call.counts + item.head * 2, skipped, mask=write, sem="relaxed")
        gl.atomic_add(call.counts + item.head * 2 + 1, exist, mask=write, sem="relaxed")
