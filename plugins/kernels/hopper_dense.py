"""Dense schedule: the product of tile j with K and of tile j-1 with V are in flight together (FlashAttention-3).

The softmax of tile j runs while the tensor cores compute P(j-1) V(j-1); the warpgroups take turns in issuing, so that
one computes exponentials while the other's products run. LAZY and FENCED are what measured faster for a head size:
README.md beside this folder has the figures.
"""

from hopper_common import BLOCK_ROWS, arrive_warp, ring_phase, ring_slot
from hopper_softmax import (
    LAG,
    add_counts,
    any_row_of_warp,
    as_operand,
    clean_values,
    existing_tiles,
    first_maximum,
    hide_columns,
    no_sums,
    partial_sums,
    probabilities,
    rescale,
    rows_layout,
    scale_sums,
    scores_layout,
    store_output,
)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _opaque_one():
    """1, which the compiler does not know."""
    return gl.inline_asm("mov.u32 $0, 1;", ("=r",), [], gl.int32, is_pure=False)


@gluon.jit
def _soften(call, scores, reference, before, sums, acc, DTYPE: gl.constexpr):
    """`(operand, alpha, sums)`: probabilities, and what an output relative to `before` is multiplied with."""
    p, shift = probabilities(scores, call.scale_log2, reference)
    alpha = gl.exp2(before - shift)
    return as_operand(p, acc, DTYPE), alpha, scale_sums(sums, alpha) + partial_sums(p, call.COLUMNS)


@gluon.jit
def _step(call, shared, item, visible, operand, acc, reference, sums, tile, j, turn, MASKED: gl.constexpr,
          GROUP: gl.constexpr, DTYPE: gl.constexpr, LAZY: gl.constexpr, FENCED: gl.constexpr):  # fmt: skip
    slot = ring_slot(tile, call.STAGES)
    before = ring_slot(tile - 1, call.STAGES)
    zeros = gl.full([BLOCK_ROWS, call.COLUMNS], 0.0, gl.float32, scores_layout(call.COLUMNS))
    mbarrier.wait(shared.k_full.index(slot), ring_phase(tile, call.STAGES))
    mbarrier.wait(shared.turn.index(GROUP), (turn & 1) ^ (1 if GROUP == 0 else 0))
    scores_token = warpgroup_mma(shared.q.index(GROUP), shared.k.index(slot).permute((1, 0)), zeros, use_acc=False,
                                 is_async=True)  # fmt: skip
    acc_token = warpgroup_mma(operand, shared.v.index(before), acc, is_async=True)
    arrive_warp(shared.turn.index((GROUP + 1) % call.GROUPS))
    scores = warpgroup_mma_wait(1, deps=(scores_token,))
    arrive_warp(shared.k_free.index(slot))
    if MASKED:
        scores = hide_columns(scores, j * call.COLUMNS, visible, call.COLUMNS)
    following_reference = gl.maximum(reference, gl.max(scores, 1) * call.scale_log2)
    if LAZY:
        rises = any_row_of_warp(following_reference - reference > LAG)
        following_reference = gl.where(rises > 0, following_reference, reference)
    if FENCED:
        following = operand
        alpha = reference
        if _opaque_one() > 0:  # a block of its own, out of which ptxas does not move the exponentials
            following, alpha, sums = _soften(call, scores, following_reference, reference, sums, acc, DTYPE)
    else:
        following, alpha, sums = _soften(call, scores, following_reference, reference, sums, acc, DTYPE)
    mbarrier.wait(shared.v_full.index(slot), ring_phase(tile, call.STAGES))
    acc, operand, following = warpgroup_mma_wait(0, deps=(acc_token, operand, following))
    arrive_warp(shared.v_free.index(before))
    if LAZY:
        if rises > 0:
            acc = rescale(acc, alpha)
    else:
        acc = rescale(acc, alpha)
    return following, acc, following_reference, sums


@gluon.jit
def consume_dense(call, shared, GROUP: gl.constexpr, DTYPE: gl.constexpr, O_IN_Q: gl.constexpr, LAZY: gl.constexpr,
                  FENCED: gl.constexpr):  # fmt: skip
    """One consumer warpgroup: 64 rows of every item."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.HEAD, 16])
    sequence = 0
    base = 0
    turn = 0
    cleaned = 0
    while shared.receive_item(sequence) != 0:
        item = shared.read_item(sequence)
        first_row = item.row0 + GROUP * BLOCK_ROWS
        rows = first_row + gl.arange(0, BLOCK_ROWS, rows_layout(call.COLUMNS))
        visible = item.visible_columns(call, rows)
        whole = item.visible_columns(call, first_row) // call.COLUMNS  # tiles that need no mask

        slot = ring_slot(base, call.STAGES)
        zeros = gl.full([BLOCK_ROWS, call.COLUMNS], 0.0, gl.float32, scores_layout(call.COLUMNS))
        mbarrier.wait(shared.q_full.index(GROUP), sequence & 1)
        mbarrier.wait(shared.k_full.index(slot), ring_phase(base, call.STAGES))
        token = warpgroup_mma(shared.q.index(GROUP), shared.k.index(slot).permute((1, 0)), zeros, use_acc=False,
                              is_async=True)  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=(token,))
        arrive_warp(shared.k_free.index(slot))
        if whole == 0:
            scores = hide_columns(scores, 0, visible, call.COLUMNS)
        acc = gl.full([BLOCK_ROWS, call.HEAD], 0.0, gl.float32, ACC)
        nothing = first_maximum(item, rows)
        reference = gl.maximum(nothing, gl.max(scores, 1) * call.scale_log2)
        operand, _, sums = _soften(call, scores, reference, nothing, no_sums(call.COLUMNS), acc, DTYPE)
        mbarrier.wait(shared.v_full.index(slot), ring_phase(base, call.STAGES))

        whole = gl.maximum(gl.minimum(whole, item.tiles), 1)
        for j in range(1, whole):
            operand, acc, reference, sums = _step(
                call, shared, item, visible, operand, acc, reference, sums, base + j, j, turn, False, GROUP, DTYPE,
                LAZY, FENCED,
            )  # fmt: skip
            turn += 1
        for j in range(whole, item.tiles):
            operand, acc, reference, sums = _step(
                call, shared, item, visible, operand, acc, reference, sums, base + j, j, turn, True, GROUP, DTYPE,
                LAZY, FENCED,
            )  # fmt: skip
            turn += 1

        if not O_IN_Q:
            arrive_warp(shared.q_free.index(GROUP))
        last = base + item.tiles - 1
        slot = ring_slot(last, call.STAGES)
        cleaned = clean_values(call, shared, item, slot, cleaned, GROUP)
        token = warpgroup_mma(operand, shared.v.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(token,))
        arrive_warp(shared.v_free.index(slot))

        item = shared.read_item(sequence)
        store_output(call, shared, item, acc, reference, sums, DTYPE, GROUP, O_IN_Q)
        add_counts(call, item, 0, existing_tiles(call, item, GROUP), GROUP)
        shared.release_item(sequence)
        base += item.tiles
        sequence += 1
