"""The shared memory through which a warpgroup's Q comes in and its output leaves, in one of four ways (Call.QUERIES).

"double": two buffers in turn. Q of the next item is loaded early, an item's output leaves through the buffer that its Q
came in, and that is free again once the next item has begun.
"queue": a ring of one buffer more than there are warpgroups, where there is no room for two each. Q of an item's row
blocks comes in an order, and who is done with the item before takes a ticket for the next of them. So the first finds
its Q there, and the others wait for a buffer of one before them, not for their own.
"apart": one buffer for Q, free after the item's last scores, and one for the output, both at addresses that the
compiler knows.
"shared": a single buffer for both, where there is no room for more.

The ticket says which of an item's row blocks is a warpgroup's; where there is no queue it is the warpgroup's number.
"""

from hopper_common import VOTE_BARRIER, last_item_row, ring_phase, ring_slot, three_skip_full
from hopper_shared import arrive_warp, await_barrier, await_phase, cell, query_places, read_word, uniform
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

HOLD_CYCLES = gl.constexpr(700)  # by which the first begins later,
HOLD_TILES = gl.constexpr(24)  # in items of at least so many tiles


@gluon.constexpr_function
def query_buffers(queries, groups):
    """Buffers of all warpgroups, of Q and of the output."""
    return query_places(queries, groups) + (groups if queries == "apart" else 0)


@gluon.jit
def _place(call, sequence, ticket):
    """Where the Q of that ticket for the item with this running number lies, and its barriers."""
    if call.QUERIES == "queue":
        return ring_slot(sequence * call.GROUPS + ticket, query_places(call.QUERIES, call.GROUPS))
    elif call.QUERIES == "double":
        return ring_slot(sequence, 2) * call.GROUPS + ticket
    else:
        return ticket


@gluon.jit
def _phase(call, sequence, ticket):
    """The phase in which they are then."""
    if call.QUERIES == "queue":
        return ring_phase(sequence * call.GROUPS + ticket, query_places(call.QUERIES, call.GROUPS))
    elif call.QUERIES == "double":
        return ring_phase(sequence, 2)
    else:
        return ring_phase(sequence, 1)


@gluon.jit
def first_row(call, item, ticket):
    """The first row of a ticket's row block.

    In a causal queue who comes first gets the rows that see most: a warpgroup whose rows always saw least would be a
    tile ahead of the others, and the tensor cores idle more (README.md). Where the last item of a head begins within
    the one before (`Call.first_row`), what they share is the last one's, and here a block that does not exist.
    """
    if call.QUERIES == "queue" and call.CAUSAL:
        return item.row0 + (call.GROUPS - 1 - ticket) * call.ROWS
    elif three_skip_full(call):
        first = item.row0 + ticket * call.ROWS
        last = last_item_row(call, item.q_end)
        return gl.where((item.row0 < last) & (first >= last), call.seq_q, first)
    else:
        return item.row0 + ticket * call.ROWS


@gluon.jit
def issue_tickets(call, cells):
    """Makes both counters zero, of tickets taken and of Q received by them, before the roles begin."""
    if call.QUERIES == "queue":
        base = gl.inline_asm("mov.b32 $0, $1;", ("=r", "r"), [cells], gl.int32, is_pure=False)
        gl.inline_asm(
            "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;"
            " @first st.shared.b32 [$0], $1; @first st.shared.b32 [$0+4], $1; }",
            ("r", "r"), [base + cell(call, "tickets", 0).FIRST * 8, gl.to_tensor(0)], (), is_pure=False,
        )  # fmt: skip


@gluon.jit
def take_ticket(call, shared, sequence):
    """To be called before the first item, and when this warpgroup's output of the item before is under way.

    One thread takes it, and the others learn of it. Not before all warpgroups have received their Q of the item before:
    where items are short, one might come so early that the barrier it waits at is still in the phase of the Q before.
    """
    if call.QUERIES == "queue":
        counters = shared.at(cell(call, "tickets", 0))
        own = shared.at(cell(call, "tickets", 1 + shared.group))
        # no branch is a single lane's, or ptxas would move every operand address of the loops through vector registers
        gl.inline_asm(
            "{ .reg .pred first, early; .reg .b32 thread, count; mov.u32 thread, %tid.x; and.b32 thread, thread, 127;"
            " setp.eq.u32 first, thread, 0;"
            " again: ld.volatile.shared.b32 count, [$0+4]; setp.lt.s32 early, count, $2;"
            " vote.sync.any.pred early, early, 0xffffffff; @early bra again;"
            " @first atom.shared.add.u32 count, [$0], 1; sub.s32 count, count, $2; @first st.shared.b32 [$1], count;"
            " barrier.cta.sync $3, 128; }",
            ("r", "r", "r", "r"), [counters, own, sequence * call.GROUPS, VOTE_BARRIER + shared.group], (),
            is_pure=False,
        )  # fmt: skip


@gluon.jit
def ticket_of(call, shared):
    """This warpgroup's ticket for its item, until `output_sent`: then the cell holds the next one."""
    if call.QUERIES == "queue":
        return uniform(read_word(shared, cell(call, "tickets", 1 + shared.group)))
    else:
        return shared.group


@gluon.jit
def load_queries(call, shared, item, sequence):
    """The producer's part."""
    for ticket in gl.static_range(call.GROUPS):
        place = _place(call, sequence, ticket)
        full = shared.barrier(cell(call, "q_full", place))
        await_barrier(shared, cell(call, "q_free", place), _phase(call, sequence, ticket) ^ 1)
        mbarrier.expect(full, call.ROWS * call.HEAD * 2)
        tma.async_load(call.q, [item.batch, item.head, first_row(call, item, ticket), 0], full, shared.q.index(place))


@gluon.jit
def hold_first(call, item, ticket):
    """Lets the first warpgroup of a causal queue begin its item a little later, where items are long.

    Its Q is there, and the others' come together a good while after that. From such a beginning the three mostly fall
    into a rhythm that is 3 % slower, for the whole item (README.md).
    """
    if call.QUERIES == "queue" and call.CAUSAL:
        cycles = gl.where((ticket == 0) & (item.tiles >= HOLD_TILES), HOLD_CYCLES, 0)
        gl.inline_asm(
            "{ .reg .b32 from, now; .reg .pred early; mov.u32 from, %clock;"
            " again: mov.u32 now, %clock; sub.u32 now, now, from; setp.lt.u32 early, now, $0;"
            " vote.sync.any.pred early, early, 0xffffffff; @early bra again; }",
            ("r",), [cycles], (), is_pure=False,
        )  # fmt: skip


@gluon.jit
def receive_queries(call, shared, sequence, ticket):
    """Waits for this warpgroup's rows of Q."""
    place = _place(call, sequence, ticket)
    await_phase(shared, cell(call, "q_full", place), _phase(call, sequence, ticket))
    if call.QUERIES == "queue":
        gl.inline_asm(
            "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; and.b32 thread, thread, 127;"
            " setp.eq.u32 first, thread, 0; @first red.shared.add.u32 [$0+4], 1; }",
            ("r",), [shared.at(cell(call, "tickets", 0))], (), is_pure=False,
        )  # fmt: skip
    return shared.q.index(place)


@gluon.jit
def queries_again(call, shared, queries):
    """The same `queries`, where heads have 256 columns found again at every use.

    The descriptors of the product's 16 operands would otherwise be kept from tile to tile, and fill the uniform
    registers: 3 % slower.
    """
    if call.HEAD == 256:
        place = _place(call, 0, shared.group)  # of a single buffer
        place = gl.inline_asm("mov.b32 $0, $1;", ("=r", "r"), [place], gl.int32, is_pure=False)
        return shared.q.index(place)
    else:
        return queries


@gluon.jit
def _free(call, shared, sequence, ticket):
    arrive_warp(shared, cell(call, "q_free", _place(call, sequence, ticket)))


@gluon.jit
def item_begun(call, shared, sequence):
    """To be called when an item has begun: by then the output of the one before has left."""
    if call.QUERIES == "double":  # noqa: SIM102 (the compiler decides the one, the kernel the other)
        if sequence > 0:
            tma.store_wait(0)
            _free(call, shared, sequence - 1, shared.group)


@gluon.jit
def last_scores_done(call, shared, sequence):
    """To be called when nothing more of an item's Q will be read."""
    if call.QUERIES == "apart":
        _free(call, shared, sequence, shared.group)


@gluon.jit
def output_buffer(call, shared, sequence, ticket):
    """Where the item's output is put together."""
    if call.QUERIES == "apart":
        tma.store_wait(0)  # the previous item's rows have left the buffer
        return shared.q.index(call.GROUPS + shared.group)
    else:
        return shared.q.index(_place(call, sequence, ticket))


@gluon.jit
def output_sent(call, shared, sequence, ticket):
    """To be called when the copy of the output has been issued.

    The buffer is given back before the next Q is waited for: whose buffer that Q comes in may wait for this one. The
    ticket can be waited for before: what others have yet to receive is Q of this item, which comes in buffers of items
    before, and those are given back, because all who used them are in this item or done with it.
    """
    take_ticket(call, shared, sequence + 1)
    if call.QUERIES == "shared" or call.QUERIES == "queue":
        tma.store_wait(0)
        _free(call, shared, sequence, ticket)
