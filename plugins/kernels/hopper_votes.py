"""The decision whether a tile is kept: a vote of a warpgroup, joined with that of the other half of 128 rows."""

from hopper_common import DRIFT, VOTE_BARRIER
from hopper_rings import tile_phase, tile_place
from hopper_shared import await_barrier, await_phase, cell, read_word
from hopper_softmax import any_asm, for_shares
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _vote_asm(rows):
    return any_asm(rows, f"barrier.cta.red.or.pred wanted, ${1 + rows // 32}, 128, wanted;")


@gluon.jit
def any_row(shared, wants):
    """1 if `wants` (a bool a thread and 32 rows) holds anywhere in this warpgroup, else 0: one barrier with a vote."""
    ASM: gl.constexpr = _vote_asm(wants.shape[0])
    barrier = VOTE_BARRIER + shared.group
    return gl.inline_asm(ASM, ("=r", "r", "r"), [wants.to(gl.int32), barrier], gl.int32, is_pure=False)


@gluon.jit
def post_vote(call, shared, vote, tile):
    """Publishes this warpgroup's vote on a tile, for the other one and for the producer of V."""
    place = shared.group * DRIFT + tile_place(call, tile)
    voted = place if call.JOINT else tile_place(call, tile)
    gl.inline_asm(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %tid.x; and.b32 lane, lane, 127;"
        " setp.eq.u32 first, lane, 0; @first st.shared.b32 [$0], $1;"
        " @first mbarrier.arrive.shared::cta.b64 _, [$2]; }",
        ("r", "r", "r"), [shared.at(cell(call, "votes", place)), vote, shared.at(cell(call, "voted", voted))], (),
        is_pure=False,
    )  # fmt: skip


@gluon.jit
def joint_vote(call, shared, own, tile):
    """Joins the posted votes of two warpgroups that share a row block, so that it is kept if either wants it.

    Where the own vote says keep, the other's is not waited for.
    """
    keep = own
    if own == 0:
        other = (1 - shared.group) * DRIFT + tile_place(call, tile)
        await_phase(shared, cell(call, "voted", other), tile_phase(call, tile))
        keep = read_word(shared, cell(call, "votes", other))
    return keep


@gluon.jit
def decide(call, shared, item, maxima, m, tile):
    """1 if the tile is kept.

    Some column of a row reaches the threshold if and only if some thread's share of the row does, so the vote needs
    `partial_maxima` only: what threads exchange for the row's maximum is not waited for.
    """
    keep = any_row(shared, maxima - for_shares(m, maxima) >= item.log2_threshold)
    if call.JOINT or call.ON_DEMAND:
        post_vote(call, shared, keep, tile)
    if call.JOINT:
        keep = joint_vote(call, shared, keep, tile)
    return keep


@gluon.jit
def any_vote(call, shared, tile):
    """For the producer of V: whether a warpgroup wants the tile, once all have voted."""
    result = gl.to_tensor(0)
    for group in gl.static_range(call.GROUPS):
        place = group * DRIFT + tile_place(call, tile)
        result |= read_word(shared, cell(call, "votes", place))
    return result


@gluon.jit
def await_votes(call, shared, tile):
    """Waits until all have voted."""
    for group in gl.static_range(call.GROUPS if call.JOINT else 1):
        await_barrier(shared, cell(call, "voted", group * DRIFT + tile_place(call, tile)), tile_phase(call, tile))
