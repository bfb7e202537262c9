"""What every warp of the Hopper prefill kernel shares: the call, the work item, and how tiles are counted."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

TILE_COLUMNS = gl.constexpr(128)  # key columns of a decision, whatever the width of a loaded tile
DRIFT = gl.constexpr(8)  # tiles by which the roles may drift apart, and more: K_STAGES + V_STAGES at most
DRIFT_BITS = gl.constexpr(3)
VOTE_BARRIER = gl.constexpr(8)  # first named barrier of the votes and tickets, above those of Triton
TURN_BARRIER = gl.constexpr(12)  # of the turns, above those of the votes
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
def end_block(tile):
    """Ends a basic block, by a branch that is never taken: what stands below, ptxas does not move above it.

    A second one on the same `tile`, a running number, does nothing: by then ptxas knows that it is not negative.
    """
    gl.inline_asm(
        "{ .reg .pred negative; setp.lt.s32 negative, $0, 0; @!negative bra done;"
        " again: nanosleep.u32 1000; bra again; done: }",
        ("r",), [tile], (), is_pure=False,
    )  # fmt: skip


@gluon.jit
def converged():
    """Tells ptxas that the threads of a warp are together here: what is the same for all can stay in uniform registers.

    It believes it of instructions that want a whole warp ("aligned"), and then also of the loop in front of one.
    """
    gl.inline_asm("wgmma.wait_group.sync.aligned 0;", (), [], (), is_pure=False)


@gluon.jit
def await_turn(group):
    """Waits until it is this warpgroup's turn: for 256 threads, its own and those that give it."""
    gl.inline_asm("barrier.cta.sync $0, 256;", ("r",), [TURN_BARRIER + group], (), is_pure=False)


@gluon.jit
def give_turn(group):
    """To that warpgroup."""
    gl.inline_asm("barrier.cta.arrive $0, 256;", ("r",), [TURN_BARRIER + group], (), is_pure=False)


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
    # causal: the first row of the first row block, at most 0, as blocks end where the sequence ends; else, with three
    # warpgroups that skip, the offset of the last block's first row: -64 where it would have 64 rows or fewer, or 0
    # (`last_item_row`)
    first_row: gl.tensor
    heads: gl.tensor  # batch * heads_q
    section: gl.tensor  # heads worked on at the same time, so that their K and V stay in L2
    last_section: gl.tensor  # first head of the last section, which has more of them, for an even end
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
    ONES: gl.constexpr  # row sums come with the product with V, see hopper_product
    PIECES: gl.constexpr  # in which P is then made and multiplied
    ON_DEMAND: gl.constexpr  # while few tiles are kept, V is loaded once a tile is

    @gluon.jit
    def has(self, BIT: gl.constexpr):
        return (self.given & BIT) != 0


@gluon.jit
def three_skip_full(call):
    """Whether three warpgroups compute attention that is not causal and may skip: there items may overlap."""
    return call.GROUPS == 3 and call.ONES and not call.CAUSAL


@gluon.jit
def last_item_row(call, q_end):
    """The first row of a head's last item, in such kernels. Where few rows exist, all are in the items before."""
    last = (call.row_blocks - 1) * (call.GROUPS * call.ROWS)
    return gl.where(q_end > last, last + call.first_row, last)


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
    tiles: gl.tensor  # loaded tiles, at least one: an item that sees nothing loads one and stores zeros
    log2_threshold: gl.tensor

    @gluon.jit
    def has(self, row):
        """Whether that row exists. There are rows below 0 in the first block of a head (`Call.first_row`)."""
        return (row >= 0) & (row < self.q_end)

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
