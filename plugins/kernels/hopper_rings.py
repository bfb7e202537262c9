"""Where K and V of a tile lie in shared memory, and which barriers tell when they are there and when they are free.

Tiles are counted over all items of a CTA. The buffers are used in one of two ways (Call.ALTERNATE):

apart: one ring of K_STAGES for K and one of V_STAGES for V.

alternating: one ring for both, in which K and V of every tile follow each other. It has an odd number of buffers, so
that V takes the one in which K of two tiles before was (of five buffers), and not the one that V of two tiles before
leaves. Scores are done with K long before a softmax is done with V: V of the next tile can be under way while the
slowest warpgroup still multiplies with V of this one, and warpgroups that drift apart do not wait for each other.
"""

from hopper_common import DRIFT, DRIFT_BITS, ring_phase, ring_slot
from hopper_shared import arrive_warp, await_barrier, cell
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _carries(alternate, head):
    """Whether loops carry from tile to tile where a tile's barriers are; else that is found from its number.

    As it was faster, by 1 to 5 % (README.md).
    """
    return alternate or head == 256


@gluon.aggregate
class Tile:
    number: gl.tensor
    slot: gl.tensor  # the buffer of K
    place: gl.tensor  # of its barriers and votes among those of all tiles within DRIFT; 0 where not carried
    phase: gl.tensor  # that they are in; 0 where not carried


@gluon.jit
def at_tile(call, number):
    """The tile with this number.

    Where K and V alternate by masks, 1 % faster (README.md): what `ring_slot` warns of does not happen there.
    """
    if call.ALTERNATE:
        slot = ring_slot(2 * number, call.K_STAGES + call.V_STAGES)
        return Tile(number, slot, number & (DRIFT - 1), (number >> DRIFT_BITS) & 1)
    else:
        slot = ring_slot(number, call.K_STAGES)
        if _carries(call.ALTERNATE, call.HEAD):
            return Tile(number, slot, ring_slot(number, DRIFT), ring_phase(number, DRIFT))
        else:
            none = gl.to_tensor(0)
            return Tile(number, slot, none, none)


@gluon.jit
def next_tile(call, tile):
    """The tile after it. Where K and V alternate, without the division that finds a buffer."""
    number = tile.number + 1
    if call.ALTERNATE:
        slot = _next_buffer(call, _next_buffer(call, tile.slot))
        return Tile(number, slot, number & (DRIFT - 1), (number >> DRIFT_BITS) & 1)
    else:
        return at_tile(call, number)


@gluon.jit
def tile_place(call, tile):
    """Where the barriers or the votes of a tile lie among those of all tiles within DRIFT."""
    CARRIES: gl.constexpr = _carries(call.ALTERNATE, call.HEAD)
    return tile.place if CARRIES else ring_slot(tile.number, DRIFT)


@gluon.jit
def tile_phase(call, tile):
    """The phase in which they are then."""
    CARRIES: gl.constexpr = _carries(call.ALTERNATE, call.HEAD)
    return tile.phase if CARRIES else ring_phase(tile.number, DRIFT)


@gluon.jit
def _next_buffer(call, slot):
    LAST: gl.constexpr = call.K_STAGES + call.V_STAGES - 1
    return gl.where(slot == LAST, 0, slot + 1)


@gluon.jit
def value_slot(call, tile):
    """The buffer of V."""
    if call.ALTERNATE:
        return _next_buffer(call, tile.slot)
    else:
        return ring_slot(tile.number, call.V_STAGES)


@gluon.jit
def _key_place(call, tile):
    if call.ALTERNATE:
        return tile.place
    else:
        return tile.slot


@gluon.jit
def key_full(call, tile):
    return cell(call, "k_full", _key_place(call, tile))


@gluon.jit
def key_free(call, tile):
    return cell(call, "k_free", _key_place(call, tile))


@gluon.jit
def key_phase(call, tile):
    if call.ALTERNATE:
        return tile.phase
    else:
        return ring_phase(tile.number, call.K_STAGES)


@gluon.jit
def value_full(call, tile):
    return cell(call, "v_full", tile_place(call, tile))


@gluon.jit
def value_free(call, tile):
    return cell(call, "v_free", tile_place(call, tile))


@gluon.jit
def value_phase(call, tile):
    return tile_phase(call, tile)


@gluon.jit
def _await_values_gone(call, shared, tile):
    """Waits until nobody needs V of a tile any more, and nothing writes there."""
    await_barrier(shared, value_free(call, tile), value_phase(call, tile))
    # whoever skipped it has not waited for its copy
    await_barrier(shared, value_full(call, tile), value_phase(call, tile))


@gluon.jit
def await_key_buffer(call, shared, tile):
    """For the producer of K: waits for the buffer of a tile.

    Where K and V alternate, that keeps all roles within DRIFT: nobody begins a tile before everybody is done with V of
    three before (of five buffers), and V of that one has been loaded.
    """
    if call.ALTERNATE:
        before = tile.number - (call.K_STAGES + call.V_STAGES + 1) // 2
        if before >= 0:
            _await_values_gone(call, shared, at_tile(call, before))
    else:
        await_barrier(shared, key_free(call, tile), key_phase(call, tile) ^ 1)


@gluon.jit
def await_value_buffer(call, shared, tile):
    """For the producer of V: waits for the buffer of a tile.

    Nobody waits for V of a tile that he skips, so where the rings are apart this role keeps the others from running
    away from it by holding back a slot of K: that of the same tile, or, where there are more buffers of V than of K,
    that of an earlier one. Where they alternate K waits for V as it is.
    """
    if call.ALTERNATE:
        number = tile.number - (call.K_STAGES + call.V_STAGES) // 2
        if number >= 0:
            before = at_tile(call, number)
            await_barrier(shared, key_free(call, before), key_phase(call, before))
    else:
        before = tile.number - call.V_STAGES
        if before >= 0:
            _await_values_gone(call, shared, at_tile(call, before))
        ahead = tile.number - _ahead(call.K_STAGES, call.V_STAGES)
        if ahead >= 0:
            arrive_warp(shared, key_free(call, at_tile(call, ahead)))


@gluon.constexpr_function
def _ahead(key_stages, value_stages):
    """Tiles by which the producer of V may be ahead of the slots of K that are taken in order."""
    return max(value_stages - key_stages, 0)


@gluon.jit
def voted_before(call, tile):
    """Number of the last tile on which all have voted once `await_value_buffer` returns; negative if there is none.

    Whoever is done with the scores of a tile has voted on the one before.
    """
    if call.ALTERNATE:
        return tile.number - (call.K_STAGES + call.V_STAGES) // 2 - 1
    else:
        return tile.number - call.V_STAGES
