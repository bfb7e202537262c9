"""What every warp of the Hopper prefill kernel shares: the call, the shared memory, and the way work is handed out.

A CTA is persistent. One producer warp takes work items (one batch entry, one query head, one block of query rows) from
a counter in device memory, describes each to the others and streams Q and K through shared memory with the copy engine
(TMA); a second one streams V; each consumer warpgroup owns 64 query rows. Barriers live across items, so the loads of
the next item overlap the last products and the epilogue of the current one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

BLOCK_ROWS = gl.constexpr(64)  # query rows of one consumer warpgroup: the M of a wgmma
TILE_COLUMNS = gl.constexpr(128)  # key columns of a decision, whatever the width of a loaded tile
DRIFT = gl.constexpr(8)  # tiles by which the roles may drift apart, and more: K_STAGES + V_STAGES at most
TURN_BARRIER = gl.constexpr(12)  # first named barrier of the turns, above those of Triton and of the votes
NEVER_VOTES = gl.constexpr(1e30)  # running maximum of a row outside the tensor: nothing comes near it
DENSITY_ONE = gl.constexpr(256)  # share of tiles that are kept, as the producer of V follows it: all of them
DENSITY_DEMAND = gl.constexpr(40)  # below, V is loaded on demand
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
    COLUMNS: gl.constexpr  # key columns of a loaded tile
    HEAD: gl.constexpr  # head size in shared memory; narrower heads are zero-filled by the copy engine
    K_STAGES: gl.constexpr  # tiles of K in shared memory
    V_STAGES: gl.constexpr
    CAUSAL: gl.constexpr
    GENERAL: gl.constexpr  # window, softcap and bias are possible, and causality is asked for at run time
    JOINT: gl.constexpr  # decide 64 * GROUPS rows together instead of 64
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

    `*_full`: filled by the copy engine. `*_free`: no longer read; every consumer warp arrives for itself. V has
    barriers for every tile within DRIFT, the others for every buffer.
    """

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    o: gl.shared_memory_descriptor
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
    def any_vote(self, tile, GROUPS: gl.constexpr):
        """Whether a warpgroup keeps the tile, once all have voted."""
        result = gl.to_tensor(0)
        for group in gl.static_range(GROUPS):
            place = self.votes.index(group * DRIFT + ring_slot(tile, DRIFT))
            result |= gl.inline_asm("ld.shared.b32 $0, [$1];", ("=r", "r"), [place], gl.int32, is_pure=False)
        return result

    @gluon.jit
    def release_item(self, sequence):
        arrive_warp(self.item_free.index(ring_slot(sequence, 2)))


@gluon.jit
def log2_threshold(call, batch, kv_end):
    """log2 of the threshold of a batch entry; ALWAYS_KEEP where it is zero or means dense."""
    value = call.threshold
    if call.threshold_factor > 0:
        value = call.threshold_factor / kv_end.to(gl.float32)
    if call.has(HAS_THRESHOLD_SCALE):
        value = value * gl.load(call.threshold_scale)
    result = gl.to_tensor(ALWAYS_KEEP)
    if value > 0 and value < 1:
        result = gl.log2(value)
    return result


@gluon.jit
def unpack_item(call, index):
    """Order of the work: full attention head by head; causal longest block first within a section of heads."""
    if call.CAUSAL:
        first = index // (call.section * call.row_blocks) * call.section
        width = gl.minimum(call.section, call.heads - first)
        place = index - first * call.row_blocks
        head = first + place % width
        block = call.row_blocks - 1 - place // width
    else:
        head = index // call.row_blocks
        block = index % call.row_blocks
    batch = head // call.heads_q
    ROWS: gl.constexpr = call.GROUPS * BLOCK_ROWS
    row0 = block * ROWS
    kv_end = call.seq_k
    q_end = call.seq_q
    q_start = call.seq_k - call.seq_q
    if call.has(HAS_KV_LENGTHS):
        kv_end = gl.maximum(gl.minimum(gl.load(call.kv_lengths + batch), kv_end), 0)
    if call.has(HAS_Q_LENGTHS):
        q_end = gl.minimum(gl.load(call.q_lengths + batch), q_end)
    if call.has(HAS_Q_START):
        q_start = gl.load(call.q_start + batch)
    threshold = log2_threshold(call, batch, kv_end)
    none = gl.to_tensor(0)
    item = Item(batch, head % call.heads_q, row0, q_end, q_start, kv_end, none, none, threshold)
    first = none
    if call.GENERAL and call.window > 0:
        first = gl.maximum(row0 + q_start - call.window + 1, 0) // call.COLUMNS
    end = gl.cdiv(item.visible_columns(call, gl.minimum(row0 + ROWS, q_end) - 1), call.COLUMNS)
    tiles = gl.where(row0 < q_end, gl.maximum(end - first, 1), 1)
    return Item(batch, head % call.heads_q, row0, q_end, q_start, kv_end, first, tiles, threshold)


@gluon.jit
def is_active(call, item):
    """Whether this launch computes the item, or the launch of the other kernel beside it."""
    dense = item.log2_threshold == ALWAYS_KEEP
    return not ((call.has(RUN_WHERE_DENSE) and not dense) or (call.has(RUN_WHERE_SPARSE) and dense))


@gluon.jit
def load_tile(desc, batch, head, row, full, slot, COLUMNS: gl.constexpr, HEAD: gl.constexpr):
    mbarrier.expect(full, COLUMNS * HEAD * 2)
    tma.async_load(desc, [batch, head, row, 0], full, slot)


@gluon.jit
def produce_keys(call, shared):
    """The first producer warp: hands out items, loads their Q and streams their K."""
    sequence = 0
    tile = 0  # tiles streamed so far, from which the place in the ring follows
    index = gl.program_id(0)
    items = call.heads * call.row_blocks
    while index < items:
        item = unpack_item(call, index)
        if is_active(call, item):
            shared.publish_item(sequence, 1, item)
            kv_head = item.head // call.group
            for j in range(item.tiles):
                slot = ring_slot(tile, call.K_STAGES)
                mbarrier.wait(shared.k_free.index(slot), ring_phase(tile, call.K_STAGES) ^ 1)
                load_tile(call.k, item.batch, kv_head, (item.first + j) * call.COLUMNS, shared.k_full.index(slot),
                          shared.k.index(slot), call.COLUMNS, call.HEAD)  # fmt: skip
                if j == 0:
                    for group in gl.static_range(call.GROUPS):
                        mbarrier.wait(shared.q_free.index(group), (sequence & 1) ^ 1)
                        load_tile(call.q, item.batch, item.head, item.row0 + group * BLOCK_ROWS,
                                  shared.q_full.index(group), shared.q.index(group), BLOCK_ROWS, call.HEAD)  # fmt: skip
                tile += 1
            sequence += 1
        if call.has(HAS_COUNTER):
            index = gl.num_programs(0) + gl.atomic_add(call.counter, 1, sem="relaxed")
        else:
            index += gl.num_programs(0)
    shared.publish_item(sequence, 0, unpack_item(call, gl.to_tensor(0)))


@gluon.jit
def produce_values(call, shared):
    """The second producer warp: streams V, so that waiting for its buffers does not hold up K.

    Nobody waits for V of a tile that he skips, so this role keeps the others from running away from it by holding back
    a slot of K.

    ON_DEMAND, while few tiles are kept, V is loaded only when a warpgroup has voted to keep the tile: causal row blocks
    walk through K and V at different places, and all of it seems to be more than L2 delivers. While many tiles are
    kept, V is loaded early, for the latency. A tile that is not loaded completes its phase all the same, and no result
    changes.
    """
    sequence = 0
    tile = 0
    density = gl.to_tensor(DENSITY_ONE)
    while shared.receive_item(sequence) != 0:
        item = shared.read_item(sequence)
        kv_head = item.head // call.group
        for j in range(item.tiles):
            slot = ring_slot(tile, call.V_STAGES)
            full = shared.v_full.index(ring_slot(tile, DRIFT))
            before = tile - call.V_STAGES  # the tile that had this buffer
            if before >= 0:
                mbarrier.wait(shared.v_free.index(ring_slot(before, DRIFT)), ring_phase(before, DRIFT))
                # whoever skipped it has not waited for its copy
                mbarrier.wait(shared.v_full.index(ring_slot(before, DRIFT)), ring_phase(before, DRIFT))
            arrive_warp(shared.k_free.index(ring_slot(tile, call.K_STAGES)))
            wanted = gl.to_tensor(1)
            if call.ON_DEMAND:
                if before >= 0:
                    density += (shared.any_vote(before, call.GROUPS) * DENSITY_ONE - density) // 16
                if density < DENSITY_DEMAND:
                    for group in gl.static_range(call.GROUPS):
                        mbarrier.wait(
                            shared.voted.index(group * DRIFT + ring_slot(tile, DRIFT)), ring_phase(tile, DRIFT)
                        )
                    wanted = shared.any_vote(tile, call.GROUPS)
            if wanted != 0:
                load_tile(call.v, item.batch, kv_head, (item.first + j) * call.COLUMNS, full, shared.v.index(slot),
                          call.COLUMNS, call.HEAD)  # fmt: skip
            else:
                arrive_warp(full)
            tile += 1
        shared.release_item(sequence)
        sequence += 1
