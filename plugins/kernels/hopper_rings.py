"""Where K and V of a tile lie in shared memory, and which barriers tell when they are there and when they are free.

Tiles are counted over all items of a CTA. The buffers are used in one of two ways (Call.ALTERNATE):

apart: one ring of K_STAGES for K and one of V_STAGES for V.

alternating: one ring for both, in which K and V of every tile follow each other. It has an odd number of buffers, so
that V takes the one in which K of two tiles before was (of five buffers), and not the one that V of two tiles before
leaves. Scores are done with K long before a softmax is done with V: V of the next tile can be under way while the
slowest warpgroup still multiplies with V of this one, and warpgroups that drift apart do not wait for each other.
"""

from hopper_common import DRIFT, arrive_warp, ring_phase, ring_slot, tile_phase, tile_slot
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.constexpr_function
def key_barriers(alternate, key_stages):
    """How many K has, of each kind: of every buffer, or, like V, of every tile within DRIFT."""
    return DRIFT if alternate else key_stages


@gluon.jit
def key_slot(call, tile):
    """The buffer of K."""
    if call.ALTERNATE:
        return ring_slot(2 * tile, call.K_STAGES + call.V_STAGES)
    else:
        return ring_slot(tile, call.K_STAGES)


@gluon.jit
def value_slot(call, tile):
    """The buffer of V."""
    if call.ALTERNATE:
        return ring_slot(2 * tile + 1, call.K_STAGES + call.V_STAGES)
    else:
        return ring_slot(tile, call.V_STAGES)


@gluon.jit
def _key_place(call, tile):
    if call.ALTERNATE:
        return tile_slot(call, tile)
    else:
        return ring_slot(tile, call.K_STAGES)


@gluon.jit
def key_full(call, shared, tile):
    return shared.k_full.index(_key_place(call, tile))


@gluon.jit
def key_free(call, shared, tile):
    return shared.k_free.index(_key_place(call, tile))


@gluon.jit
def key_phase(call, tile):
    if call.ALTERNATE:
        return tile_phase(call, tile)
    else:
        return ring_phase(tile, call.K_STAGES)


@gluon.jit
def value_full(call, shared, tile):
    return shared.v_full.index(tile_slot(call, tile))


@gluon.jit
def value_free(call, shared, tile):
    return shared.v_free.index(tile_slot(call, tile))


@gluon.jit
def value_phase(call, tile):
    return tile_phase(call, tile)


@gluon.jit
def _await_values_gone(call, shared, tile):
    """Waits until nobody needs V of a tile any more, and nothing writes there."""
    mbarrier.wait(value_free(call, shared, tile), value_phase(call, tile))
    # whoever skipped it has not waited for its copy
    mbarrier.wait(value_full(call, shared, tile), value_phase(call, tile))


@gluon.jit
def await_key_buffer(call, shared, tile):
    """For the producer of K: waits for the buffer of a tile.

    Where K and V alternate, that keeps all roles within DRIFT: nobody begins a tile before everybody is done with V of
    three before (of five buffers), and V of that one has been loaded.
    """
    if call.ALTERNATE:
        before = tile - (call.K_STAGES + call.V_STAGES + 1) // 2
        if before >= 0:
            _await_values_gone(call, shared, before)
    else:
        mbarrier.wait(key_free(call, shared, tile), key_phase(call, tile) ^ 1)


@gluon.jit
def await_value_buffer(call, shared, tile):
    """For the producer of V: waits for the buffer of a tile.

    Nobody waits for V of a tile that he skips, so where the rings are apart this role keeps the others from running
    away from it by holding back a slot of K: that of the same tile, or, where there are more buffers of V than of K,
    that of an earlier one. Where they alternate K waits for V as it is.
    """
    if call.ALTERNATE:
        before = tile - (call.K_STAGES + call.V_STAGES) // 2
        if before >= 0:
            mbarrier.wait(key_free(call, shared, before), key_phase(call, before))
    else:
        before = tile - call.V_STAGES
        if before >= 0:
            _await_values_gone(call, shared, before)
        ahead = tile - _ahead(call.K_STAGES, call.V_STAGES)
        if ahead >= 0:
            arrive_warp(key_free(call, shared, ahead))


@gluon.constexpr_function
def _ahead(key_stages, value_stages):
    """Tiles by which the producer of V may be ahead of the slots of K that are taken in order."""
    return max(value_stages - key_stages, 0)


@gluon.jit
def voted_before(call, tile):
    """The last tile on which all have voted by the time that `await_value_buffer` returns; negative if there is none.

    Whoever is done with the scores of a tile has voted on the one before.
    """
    if call.ALTERNATE:
        return tile - (call.K_STAGES + call.V_STAGES) // 2 - 1
    else:
        return tile - call.V_STAGES
