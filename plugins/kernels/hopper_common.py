"""What every warp of the Hopper prefill kernel shares: the call, the work item, the shared memory and its barriers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

TILE_COLUMNS = gl.constexpr(128)  # key columns of a decision, whatever the width of a loaded tile
DRIFT = gl.constexpr(8)  # tiles by which the roles may drift apart, and more: K_STAGES + V_STAGES at most
DRIFT_BITS = gl.constexpr(3)
TURN_BARRIER = gl.constexpr(12)  # first named barrier of the turns, above those of Triton and of the votes
NEVER_VOTES = gl.constexpr(1e30)  # running maximum of a row outside the tensor: nothing comes near it
UNSEEN = gl.constexpr(-1e30)  # running maximum of a row that has seen nothing but -inf: whatever comes outgrows it
ALWAYS_KEEP = gl.constexpr(-1e29)  # log2 of a zero threshold; above -NEVER_VOTES, so that such rows still do not vote

# bits of Call.given
HAS_KV_LENGTHS = gl.constexpr(1)
HAS_Q_START = gl.constexpr(2)
HAS_Q_LENGTHS = gl.constexpr(4)
HAS_THRESHOLD_SCALE = gl.constexpr(8)
HAS_SINKS = gl.constexpr(16)
HAS_COUNTS = gl.constexpr(32)
HAS_LSE = gl.constexpr(64)
HAS_COUNTER = gl.constexpr(128)
HAS_ADDITIVE_BIAS = gl.constexpr(256)
HAS_BOOL_BIAS = gl.constexpr(512)
IS_CAUSAL = gl.constexpr(4096)  # read by the general kernel only; the others are compiled for either
COUNTS_128_ROWS = gl.constexpr(8192)  # tile counts are those of 128 rows, else of 64
RUN_WHERE_DENSE = gl.constexpr(1024)  # this launch computes only batch entries whose threshold is zero
RUN_WHERE_SPARSE = gl.constexpr(2048)  # this launch computes only batch entries whose threshold is not zero


@gluon.jit
def arrive_warp(barrier):
    """One arrival per warp, without the warpgroup-wide barrier that `mbarrier.arrive` would put in front of it."""
    gl.inline_asm(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0;"
        " bar.warp.sync 0xffffffff; @first mbarrier.arrive.shared::cta.b64 _, [$0]; }",
        ("r",), [barrier], (), is_pure=False,
    )  # fmt: skip


@gluon.jit
def await_phase(barrier, phase):
    """Waits for a phase of an mbarrier, without the warpgroup-wide barrier that `mbarrier.wait` would put in front."""
    gl.inline_asm(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; }",
        ("r", "r"), [barrier, phase], (), is_pure=False,
    )  # fmt: skip


@gluon.jit
def phase_over(barrier, phase):
    """1 if the phase is over, else 0, without waiting: to be asked while the warp waits for something else anyhow.

    All lanes get one answer from a vote, by which ptxas sees that a branch on it is taken by whole warps.
    """
    return gl.inline_asm(
        "{ .reg .pred over; mbarrier.test_wait.parity.shared::cta.b64 over, [$1], $2;"
        " vote.sync.all.pred over, over, 0xffffffff; selp.b32 $0, 1, 0, over; }",
        ("=r", "r", "r"), [barrier, phase], gl.int32, is_pure=False,
    )  # fmt: skip


@gluon.jit
def await_unless(over, barrier, phase):
    """`await_phase`, unless `phase_over` has said that the phase is over: a branch takes less time than asking."""
    gl.inline_asm(
        "{ .reg .pred done; setp.ne.b32 done, $2, 0; @done bra finished;"
        " again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; finished: }",
        ("r", "r", "r"), [barrier, phase, over], (), is_pure=False,
    )  # fmt: skip


@gluon.jit
def end_block(tile):
    """Ends a basic block, by a branch that is never taken: what stands below, ptxas does not move above it.

    A second one on the same `tile`, a running number, does nothing: by then ptxas knows that it is not negative.
    """
    gl.inline_asm(
        "{ .reg .pred negative; setp.lt.s32 negative, $0, 0; @!negative bra done;"
        " again: nanosleep.u32 1000; bra again; done: }",
        ("r",), [tile], (), is_pure=False,
    )  # fmt: skip


@gluon.constexpr_function
def _turn_asm(what, barrier):
    return f"barrier.cta.{what} {barrier}, 256;"  # the warpgroup whose turn it is, and the one that gives it


@gluon.jit
def await_turn(GROUP: gl.constexpr):
    """Waits until products of this warpgroup are issued next."""
    ASM: gl.constexpr = _turn_asm("sync", TURN_BARRIER + GROUP)
    gl.inline_asm(ASM, (), [], (), is_pure=False)


@gluon.jit
def give_turn(GROUP: gl.constexpr):
    ASM: gl.constexpr = _turn_asm("arrive", TURN_BARRIER + GROUP)
    gl.inline_asm(ASM, (), [], (), is_pure=False)


@gluon.jit
def ring_slot(tile, STAGES: gl.constexpr):
    """Where the tile with this running number lies in a ring of STAGES.

    The signed remainder is meant: with `&` the compiler sees that an unrolled loop alternates between two slots, hoists
    the addresses of both out of it, and spills 400 bytes for them.
    """
    return tile % STAGES


@gluon.jit
def ring_phase(tile, STAGES: gl.constexpr):
    """The phase in which the slot's barriers are then: 0 on the first time around, 1 on the second, 0 on the third."""
    return (tile // STAGES) & 1


@gluon.jit
def tile_slot(call, tile):
    """Where the barriers or the votes of a tile lie among those of all tiles within DRIFT.

    Where K and V alternate by a mask, 1 % faster (README.md): what `ring_slot` warns of does not happen there.
    """
    if call.ALTERNATE:
        return tile & (DRIFT - 1)
    else:
        return ring_slot(tile, DRIFT)


@gluon.jit
def tile_phase(call, tile):
    """The phase in which they are then."""
    if call.ALTERNATE:
        return (tile >> DRIFT_BITS) & 1
    else:
        return ring_phase(tile, DRIFT)


@gluon.aggregate
class Call:
    """The arguments of one launch."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    o: tma.tensor_descriptor
    kv_lengths: gl.tensor
    q_start: gl.tensor
    q_lengths: gl.tensor
    threshold_scale: gl.tensor
    sinks: gl.tensor
    counts: gl.tensor
    lse: gl.tensor
    counter: gl.tensor
    given: gl.tensor
    heads_q: gl.tensor
    group: gl.tensor
    seq_q: gl.tensor
    seq_k: gl.tensor
    row_blocks: gl.tensor
    heads: gl.tensor  # batch * heads_q
    section: gl.tensor  # heads worked on at the same time, so that their K and V stay in L2
    scale_log2: gl.tensor  # scale * log2(e)
    threshold: gl.tensor
    threshold_factor: gl.tensor
    window: gl.tensor
    softcap_log2: gl.tensor  # softcap * log2(e)
    softcap_rate: gl.tensor  # 2 * log2(e) * scale / softcap
    bias: gl.tensor
    bias_bool: gl.tensor  # the same address, as bytes
    bias_batch: gl.tensor
    bias_head: gl.tensor
    bias_row: gl.tensor
    bias_column: gl.tensor
    GROUPS: gl.constexpr  # consumer warpgroups
    ROWS: gl.constexpr  # query rows of each
    COLUMNS: gl.constexpr  # key columns of a loaded tile
    HEAD: gl.constexpr  # head size in shared memory; narrower heads are zero-filled by the copy engine
    QUERIES: gl.constexpr  # buffers of Q and the output, see hopper_queries
    K_STAGES: gl.constexpr  # buffers of K, see hopper_rings
    V_STAGES: gl.constexpr
    ALTERNATE: gl.constexpr  # K and V take turns in one ring
    CAUSAL: gl.constexpr
    GENERAL: gl.constexpr  # window, softcap and bias are possible, and causality is asked for at run time
    JOINT: gl.constexpr  # two warpgroups of 64 rows decide together
    ON_DEMAND: gl.constexpr  # while few tiles are kept, V is loaded once a tile is

    @gluon.jit
    def has(self, BIT: gl.constexpr):
        return (self.given & BIT) != 0


@gluon.aggregate
class Item:
    """One block of query rows of one head, and what it can see."""

    batch: gl.tensor
    head: gl.tensor
    row0: gl.tensor
    q_end: gl.tensor  # first row that does not exist
    q_start: gl.tensor  # key position of row 0
    kv_end: gl.tensor
    first: gl.tensor  # first tile that some row sees
    tiles: gl.tensor  # loaded tiles, at least one: an item that sees nothing computes one masked tile and stores zeros
    log2_threshold: gl.tensor

    @gluon.jit
    def visible_columns(self, call, row):
        """Number of leading key columns that `row` sees, windows and biases aside."""
        everything = self.kv_end + row * 0  # of the shape of `row`
        causal = gl.maximum(gl.minimum(self.kv_end, row + self.q_start + 1), 0)
        if call.GENERAL:
            return gl.where(call.has(IS_CAUSAL), causal, everything)
        elif call.CAUSAL:
            return causal
        else:
            return everything


@gluon.aggregate
class Shared:
    """Shared memory and its barriers.

    `*_full`: filled by the copy engine. `*_free`: no longer read; every consumer warp arrives for itself.
    """

    q: gl.shared_memory_descriptor  # and the output, see hopper_queries
    k: gl.shared_memory_descriptor  # of K and V, see hopper_rings
    v: gl.shared_memory_descriptor
    item: gl.shared_memory_descriptor
    votes: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor
    v_clean: gl.shared_memory_descriptor  # keys beyond kv_lengths have been zeroed in the last tile of V
    item_full: gl.shared_memory_descriptor
    item_free: gl.shared_memory_descriptor
    voted: gl.shared_memory_descriptor

    @gluon.jit
    def publish_item(self, sequence, more, item):
        """Describes the next item to the consumers; `more` 0 ends them."""
        slot = ring_slot(sequence, 2)
        mbarrier.wait(self.item_free.index(slot), ring_phase(sequence, 2) ^ 1)
        # one thread stores and arrives: the arrival releases its own stores
        gl.inline_asm(
            "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0;"
            " @first st.shared.b32 [$0], $2; @first st.shared.b32 [$0+4], $3; @first st.shared.b32 [$0+8], $4;"
            " @first st.shared.b32 [$0+12], $5; @first st.shared.b32 [$0+16], $6; @first st.shared.b32 [$0+20], $7;"
            " @first st.shared.b32 [$0+24], $8; @first st.shared.b32 [$0+28], $9; @first st.shared.b32 [$0+32], $10;"
            " @first st.shared.f32 [$0+36], $11;"
            " @first mbarrier.arrive.shared::cta.b64 _, [$1]; }",
            ("r", "r", "r", "r", "r", "r", "r", "r", "r", "r", "r", "f"),
            [self.item.index(slot), self.item_full.index(slot), more, item.batch, item.head, item.row0, item.q_end,
             item.q_start, item.kv_end, item.first, item.tiles, item.log2_threshold],
            (), is_pure=False,
        )  # fmt: skip

    @gluon.jit
    def receive_item(self, sequence):
        """Waits for the description of the next item; 0 if there is none."""
        slot = ring_slot(sequence, 2)
        mbarrier.wait(self.item_full.index(slot), ring_phase(sequence, 2))
        return gl.inline_asm("ld.shared.b32 $0, [$1];", ("=r", "r"), [self.item.index(slot)], gl.int32, is_pure=False)

    @gluon.jit
    def read_item(self, sequence):
        """The item announced as `sequence`. Read again where it is needed again: that is cheaper than registers."""
        words = gl.inline_asm(
            "ld.shared.b32 $0, [$9+4]; ld.shared.b32 $1, [$9+8]; ld.shared.b32 $2, [$9+12];"
            " ld.shared.b32 $3, [$9+16]; ld.shared.b32 $4, [$9+20]; ld.shared.b32 $5, [$9+24];"
            " ld.shared.b32 $6, [$9+28]; ld.shared.b32 $7, [$9+32]; ld.shared.f32 $8, [$9+36];",
            ("=&r", "=&r", "=&r", "=&r", "=&r", "=&r", "=&r", "=&r", "=&f", "r"),
            [self.item.index(ring_slot(sequence, 2))],
            (gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.float32),
            is_pure=False,
        )  # fmt: skip
        return Item(words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7], words[8])

    @gluon.jit
    def any_vote(self, call, tile):
        """Whether a warpgroup keeps the tile, once all have voted."""
        result = gl.to_tensor(0)
        for group in gl.static_range(call.GROUPS):
            place = self.votes.index(group * DRIFT + tile_slot(call, tile))
            result |= gl.inline_asm("ld.shared.b32 $0, [$1];", ("=r", "r"), [place], gl.int32, is_pure=False)
        return result

    @gluon.jit
    def release_item(self, sequence):
        arrive_warp(self.item_free.index(ring_slot(sequence, 2)))
