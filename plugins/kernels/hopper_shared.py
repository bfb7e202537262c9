"""Shared memory: buffers of Q, K and V, and cells of eight bytes, each an mbarrier or a word.

`*_full` barriers: filled by the copy engine. `*_free`: no longer read; every consumer warp arrives for itself,
for `item_free` every lane, also of the producer of V.

All cells lie in one array, and inline assembly takes an address as a number: that of the array, known to each role,
and eight times the cell. So one register serves all barriers of a tile, and the rest stands in the instructions. What
Triton hands over for an element of shared memory is masked instead, two or three instructions more at each use;
README.md says what they cost.
"""

from hopper_common import DRIFT, Item, ring_phase, ring_slot
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

ITEM_CELLS = gl.constexpr(8)  # of a work item's description


@gluon.constexpr_function
def query_places(queries, groups):
    """Buffers that Q comes in, see hopper_queries."""
    return {"double": 2 * groups, "queue": groups + 1}.get(queries, groups)


@gluon.constexpr_function
def _cells(groups, queries, key_stages, alternate, joint, drift):
    """How many cells of each kind there are, in their order.

    With three warpgroups at heads of 128 two more fit, then shared memory is full.
    """
    keys = drift if alternate else key_stages  # of every buffer, or, like V, of every tile within DRIFT
    places = query_places(queries, groups)
    voted = drift * groups if joint else drift  # each warpgroup for itself, or all together
    return {
        "k_full": keys, "k_free": keys, "v_full": drift, "v_free": drift, "voted": voted, "votes": drift * groups,
        "q_full": places, "q_free": places,
        # how many were taken, and received Q by; then the one of each warpgroup
        "tickets": 1 + groups if queries == "queue" else 0,
        "v_raw": 1,  # V with keys beyond kv_lengths, which its producer is going to zero
        "item_full": 2, "item_free": 2, "item": 2 * 8,
    }  # fmt: skip


@gluon.constexpr_function
def _first_cell(kind, *shape):
    cells = _cells(*shape)
    return sum(cells[name] for name in list(cells)[: list(cells).index(kind)])


@gluon.constexpr_function
def _count(kind, *shape):
    return _cells(*shape)[kind]


@gluon.constexpr_function
def cell_count(*shape):
    """Of all kinds; `shape`: the arguments of `_cells`."""
    return sum(_cells(*shape).values())


@gluon.aggregate
class Cell:
    place: gl.tensor  # which of its kind
    FIRST: gl.constexpr  # the cells in front of that kind


@gluon.jit
def cell(call, KIND: gl.constexpr, place):
    FIRST: gl.constexpr = _first_cell(KIND, call.GROUPS, call.QUERIES, call.K_STAGES, call.ALTERNATE, call.JOINT, DRIFT)
    return Cell(gl.to_tensor(place), gl.constexpr(FIRST))


@gluon.jit
def init_barriers(call, cells, KIND: gl.constexpr, ARRIVALS: gl.constexpr):
    FIRST: gl.constexpr = _first_cell(KIND, call.GROUPS, call.QUERIES, call.K_STAGES, call.ALTERNATE, call.JOINT, DRIFT)
    COUNT: gl.constexpr = _count(KIND, call.GROUPS, call.QUERIES, call.K_STAGES, call.ALTERNATE, call.JOINT, DRIFT)
    for i in gl.static_range(COUNT):
        mbarrier.init(cells.index(FIRST + i), count=ARRIVALS)


@gluon.aggregate
class Shared:
    q: gl.shared_memory_descriptor  # and the output, see hopper_queries
    k: gl.shared_memory_descriptor  # of K and V, see hopper_rings
    v: gl.shared_memory_descriptor
    cells: gl.shared_memory_descriptor
    base: gl.tensor  # their address
    values_word: gl.tensor  # of a descriptor of V and the ones, see hopper_product
    group: gl.tensor  # number of this warpgroup among the consumers; means nothing to a producer

    @gluon.jit
    def barrier(self, cell):
        """The mbarrier, for what takes no address."""
        return self.cells.index(cell.place + cell.FIRST)

    @gluon.jit
    def at(self, cell):
        """The address. The assembly keeps the compiler from adding in another order: cells of one place in several
        kinds are to share all but the constant, which becomes part of the instruction."""
        first = gl.inline_asm(
            "{ .reg .b32 bytes; shl.b32 bytes, $1, 3; add.s32 $0, bytes, $2; }",
            ("=r", "r", "r"),
            [cell.place, self.base],
            gl.int32,
            is_pure=True,
        )
        return first + cell.FIRST * 8


@gluon.jit
def open_shared(q, k, v, cells, values_word):
    """What a role sees of shared memory, and which warpgroup it is.

    Each calls it for itself: an address that is handed over to a role comes through memory, and the compiler no longer
    knows that it is the same for all threads. The number of the warpgroup must come from the hardware: the consumers
    run one copy of the code (join_consumers.py).
    """
    base = gl.inline_asm("mov.b32 $0, $1;", ("=r", "r"), [cells], gl.int32, is_pure=False)
    group = gl.inline_asm(
        "{ .reg .b32 group; mov.u32 group, %tid.x; shr.u32 group, group, 7;"
        " redux.sync.min.s32 $0, group, 0xffffffff; }",
        ("=r",), [], gl.int32, is_pure=False,
    )  # fmt: skip
    return Shared(q, k, v, cells, base, values_word, group)


@gluon.jit
def arrive_warp(shared, cell):
    """One arrival per warp, without the warpgroup-wide barrier that `mbarrier.arrive` would put in front of it."""
    gl.inline_asm(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0;"
        " bar.warp.sync 0xffffffff; @first mbarrier.arrive.shared::cta.b64 _, [$0]; }",
        ("r",), [shared.at(cell)], (), is_pure=False,
    )  # fmt: skip


@gluon.jit
def arrive_lanes(shared, cell):
    """One arrival per lane, each for what it has read itself: racecheck does not follow the chain of `arrive_warp`."""
    gl.inline_asm("mbarrier.arrive.shared::cta.b64 _, [$0];", ("r",), [shared.at(cell)], (), is_pure=False)


@gluon.jit
def await_phase(shared, cell, phase):
    """Waits for a phase of an mbarrier, without the warpgroup-wide barrier that `mbarrier.wait` would put in front."""
    gl.inline_asm(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; }",
        ("r", "r"), [shared.at(cell), phase], (), is_pure=False,
    )  # fmt: skip


@gluon.jit
def phase_over(shared, cell, phase):
    """1 if the phase is over, else 0, without waiting: to be asked while the warp waits for something else anyhow.

    All lanes get one answer from a vote, by which ptxas sees that a branch on it is taken by whole warps.
    """
    return gl.inline_asm(
        "{ .reg .pred over; mbarrier.test_wait.parity.shared::cta.b64 over, [$1], $2;"
        " vote.sync.all.pred over, over, 0xffffffff; selp.b32 $0, 1, 0, over; }",
        ("=r", "r", "r"), [shared.at(cell), phase], gl.int32, is_pure=False,
    )  # fmt: skip


@gluon.jit
def await_unless(shared, over, cell, phase):
    """`await_phase`, unless `phase_over` has said that the phase is over: a branch takes less time than asking."""
    gl.inline_asm(
        "{ .reg .pred done; setp.ne.b32 done, $2, 0; @done bra finished;"
        " again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; finished: }",
        ("r", "r", "r"), [shared.at(cell), phase, over], (), is_pure=False,
    )  # fmt: skip


@gluon.jit
def await_barrier(shared, cell, phase):
    """`await_phase` for a role of one warp, in Triton's form."""
    mbarrier.wait(shared.barrier(cell), phase)


@gluon.jit
def read_word(shared, cell):
    return gl.inline_asm("ld.shared.b32 $0, [$1];", ("=r", "r"), [shared.at(cell)], gl.int32, is_pure=False)


@gluon.jit
def uniform(value):
    """The same number, known to ptxas to be the same in all lanes of a warp, so that branches on it are, too."""
    return gl.inline_asm("redux.sync.min.s32 $0, $1, 0xffffffff;", ("=r", "r"), [value], gl.int32, is_pure=False)


@gluon.jit
def _item(call, sequence):
    return cell(call, "item", ring_slot(sequence, 2) * ITEM_CELLS)


@gluon.jit
def publish_item(call, shared, sequence, more, item):
    """Describes the next item to the consumers; `more` 0 ends them."""
    slot = ring_slot(sequence, 2)
    await_barrier(shared, cell(call, "item_free", slot), ring_phase(sequence, 2) ^ 1)
    # one thread stores and arrives: the arrival releases its own stores
    gl.inline_asm(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0;"
        " @first st.shared.b32 [$0], $2; @first st.shared.b32 [$0+4], $3; @first st.shared.b32 [$0+8], $4;"
        " @first st.shared.b32 [$0+12], $5; @first st.shared.b32 [$0+16], $6; @first st.shared.b32 [$0+20], $7;"
        " @first st.shared.b32 [$0+24], $8; @first st.shared.b32 [$0+28], $9; @first st.shared.b32 [$0+32], $10;"
        " @first st.shared.f32 [$0+36], $11;"
        " @first mbarrier.arrive.shared::cta.b64 _, [$1]; }",
        ("r", "r", "r", "r", "r", "r", "r", "r", "r", "r", "r", "f"),
        [shared.at(_item(call, sequence)), shared.at(cell(call, "item_full", slot)), more, item.batch, item.head,
         item.row0, item.q_end, item.q_start, item.kv_end, item.first, item.tiles, item.log2_threshold],
        (), is_pure=False,
    )  # fmt: skip


@gluon.jit
def receive_item(call, shared, sequence):
    """Waits for the description of the next item; 0 if there is none."""
    await_phase(shared, cell(call, "item_full", ring_slot(sequence, 2)), ring_phase(sequence, 2))
    return read_word(shared, _item(call, sequence))


@gluon.jit
def read_item(call, shared, sequence):
    """The item announced as `sequence`. Read again where it is needed again: that is cheaper than registers."""
    words = gl.inline_asm(
        "ld.shared.b32 $0, [$9+4]; ld.shared.b32 $1, [$9+8]; ld.shared.b32 $2, [$9+12];"
        " ld.shared.b32 $3, [$9+16]; ld.shared.b32 $4, [$9+20]; ld.shared.b32 $5, [$9+24];"
        " ld.shared.b32 $6, [$9+28]; ld.shared.b32 $7, [$9+32]; ld.shared.f32 $8, [$9+36];",
        ("=&r", "=&r", "=&r", "=&r", "=&r", "=&r", "=&r", "=&r", "=&f", "r"),
        [shared.at(_item(call, sequence))],
        (gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.float32),
        is_pure=False,
    )  # fmt: skip
    return Item(words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7], words[8])


@gluon.jit
def release_item(call, shared, sequence):
    arrive_lanes(shared, cell(call, "item_free", ring_slot(sequence, 2)))
