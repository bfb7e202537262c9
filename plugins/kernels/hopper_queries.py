"""The shared memory through which a warpgroup's Q comes in and its output leaves, in one of three ways (Call.QUERIES).

"double": two buffers in turn. Q of the next item is loaded early, an item's output leaves through the buffer that its Q
came in, and that is free again once the next item has begun.
"apart": one buffer for Q, free after the item's last scores, and one for the output, both at addresses that the
compiler knows.
"shared": a single buffer for both, where there is no room for two.
"""

from hopper_common import ring_phase, ring_slot
from hopper_shared import arrive_warp, await_barrier, await_phase, cell
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.constexpr_function
def query_stages(queries):
    """Items whose Q is in shared memory."""
    return 2 if queries == "double" else 1


@gluon.constexpr_function
def query_buffers(queries):
    """Buffers of a warpgroup."""
    return 1 if queries == "shared" else 2


@gluon.jit
def query_place(call, sequence, group):
    """Where the Q of a warpgroup for the item with this running number lies, and its barriers."""
    return ring_slot(sequence, query_stages(call.QUERIES)) * call.GROUPS + group


@gluon.jit
def load_queries(call, shared, item, sequence):
    """The producer's part."""
    for group in gl.static_range(call.GROUPS):
        place = query_place(call, sequence, group)
        full = shared.barrier(cell(call, "q_full", place))
        await_barrier(shared, cell(call, "q_free", place), ring_phase(sequence, query_stages(call.QUERIES)) ^ 1)
        mbarrier.expect(full, call.ROWS * call.HEAD * 2)
        tma.async_load(call.q, [item.batch, item.head, item.row0 + group * call.ROWS, 0], full, shared.q.index(place))


@gluon.jit
def receive_queries(call, shared, sequence, GROUP: gl.constexpr):
    """Waits for this warpgroup's rows of Q."""
    place = query_place(call, sequence, GROUP)
    await_phase(shared, cell(call, "q_full", place), ring_phase(sequence, query_stages(call.QUERIES)))
    return shared.q.index(place)


@gluon.jit
def _free(call, shared, sequence, GROUP: gl.constexpr):
    arrive_warp(shared, cell(call, "q_free", query_place(call, sequence, GROUP)))


@gluon.jit
def item_begun(call, shared, sequence, GROUP: gl.constexpr):
    """To be called when an item has begun: by then the output of the one before has left."""
    if call.QUERIES == "double":  # noqa: SIM102 (the compiler decides the one, the kernel the other)
        if sequence > 0:
            tma.store_wait(0)
            _free(call, shared, sequence - 1, GROUP)


@gluon.jit
def last_scores_done(call, shared, sequence, GROUP: gl.constexpr):
    """To be called when nothing more of an item's Q will be read."""
    if call.QUERIES == "apart":
        _free(call, shared, sequence, GROUP)


@gluon.jit
def output_buffer(call, shared, sequence, GROUP: gl.constexpr):
    """Where the item's output is put together."""
    if call.QUERIES == "apart":
        tma.store_wait(0)  # the previous item's rows have left the buffer
        return shared.q.index(call.GROUPS + GROUP)
    else:
        return shared.q.index(query_place(call, sequence, GROUP))


@gluon.jit
def output_sent(call, shared, sequence, GROUP: gl.constexpr):
    """To be called when the copy of the output has been issued."""
    if call.QUERIES == "shared":
        tma.store_wait(0)
        _free(call, shared, sequence, GROUP)
