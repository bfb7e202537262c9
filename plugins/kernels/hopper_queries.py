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
def receive_queries(call, shared, sequence):
    """Waits for this warpgroup's rows of Q."""
    place = query_place(call, sequence, shared.group)
    await_phase(shared, cell(call, "q_full", place), ring_phase(sequence, query_stages(call.QUERIES)))
    return shared.q.index(place)


@gluon.jit
def queries_again(call, shared, queries):
    """The same `queries`, where heads have 256 columns found again at every use.

    The descriptors of the product's 16 operands would otherwise be kept from tile to tile, and fill the uniform
    registers: 3 % slower.
    """
    if call.HEAD == 256:
        place = query_place(call, 0, shared.group)  # of a single buffer
        place = gl.inline_asm("mov.b32 $0, $1;", ("=r", "r"), [place], gl.int32, is_pure=False)
        return shared.q.index(place)
    else:
        return queries


@gluon.jit
def _free(call, shared, sequence):
    arrive_warp(shared, cell(call, "q_free", query_place(call, sequence, shared.group)))


@gluon.jit
def item_begun(call, shared, sequence):
    """To be called when an item has begun: by then the output of the one before has left."""
    if call.QUERIES == "double":  # noqa: SIM102 (the compiler decides the one, the kernel the other)
        if sequence > 0:
            tma.store_wait(0)
            _free(call, shared, sequence - 1)


@gluon.jit
def last_scores_done(call, shared, sequence):
    """To be called when nothing more of an item's Q will be read."""
    if call.QUERIES == "apart":
        _free(call, shared, sequence)


@gluon.jit
def output_buffer(call, shared, sequence):
    """Where the item's output is put together."""
    if call.QUERIES == "apart":
        tma.store_wait(0)  # the previous item's rows have left the buffer
        return shared.q.index(call.GROUPS + shared.group)
    else:
        return shared.q.index(query_place(call, sequence, shared.group))


@gluon.jit
def output_sent(call, shared, sequence):
    """To be called when the copy of the output has been issued."""
    if call.QUERIES == "shared":
        tma.store_wait(0)
        _free(call, shared, sequence)
