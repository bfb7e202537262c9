"""The Hopper (sm_90a) prefill kernel: shared memory, barriers, and one warp role per partition."""

from hopper_common import DRIFT, Call, Shared
from hopper_dense import consume_dense
from hopper_general import consume_general
from hopper_plain import consume_plain, consume_wide
from hopper_produce import produce_keys, produce_values
from hopper_queries import query_buffers, query_stages
from hopper_rings import key_barriers
from hopper_skip import consume_skip
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma


@gluon.jit
def _consume(call, shared, GROUP: gl.constexpr, SCHEDULE: gl.constexpr, DTYPE: gl.constexpr,
             SPECULATIVE: gl.constexpr):  # fmt: skip
    if SCHEDULE == "dense":
        consume_dense(call, shared, GROUP, DTYPE, SPECULATIVE)
    elif SCHEDULE == "skip":
        consume_skip(call, shared, GROUP, DTYPE)
    elif SCHEDULE == "general":
        consume_general(call, shared, GROUP, DTYPE)
    elif SCHEDULE == "wide":
        consume_wide(call, shared, GROUP, DTYPE)
    else:
        consume_plain(call, shared, GROUP, DTYPE)
    tma.store_wait(0)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = mbarrier.allocate_mbarrier(batch=COUNT)
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _tiles(DTYPE: gl.constexpr, HEAD: gl.constexpr, COLUMNS: gl.constexpr, K_STAGES: gl.constexpr,
           V_STAGES: gl.constexpr, ALTERNATE: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """The buffers of K and of V."""
    if ALTERNATE:
        both = gl.allocate_shared_memory(DTYPE, [K_STAGES + V_STAGES, COLUMNS, HEAD], LAYOUT)
        return both, both
    else:
        keys = gl.allocate_shared_memory(DTYPE, [K_STAGES, COLUMNS, HEAD], LAYOUT)
        return keys, gl.allocate_shared_memory(DTYPE, [V_STAGES, COLUMNS, HEAD], LAYOUT)


@gluon.jit
def prefill(
    q, k, v, o, kv_lengths, q_start, q_lengths, threshold_scale, sinks, counts, lse, counter, given, heads_q, group,
    seq_q, seq_k, row_blocks, heads, section, scale_log2, threshold, threshold_factor, window, softcap_log2,
    softcap_rate, bias, bias_bool, bias_batch, bias_head, bias_row, bias_column,
    DTYPE: gl.constexpr, HEAD: gl.constexpr, GROUPS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    QUERIES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, ALTERNATE: gl.constexpr,
    SCHEDULE: gl.constexpr, CAUSAL: gl.constexpr, JOINT: gl.constexpr, SPECULATIVE: gl.constexpr,
    ON_DEMAND: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    call = Call(
        q, k, v, o, kv_lengths, q_start, q_lengths, threshold_scale, sinks, counts, lse, counter, given, heads_q, group,
        seq_q, seq_k, row_blocks, heads, section, scale_log2, threshold, threshold_factor, window, softcap_log2,
        softcap_rate, bias, bias_bool, bias_batch, bias_head, bias_row, bias_column,
        gl.constexpr(GROUPS), gl.constexpr(ROWS), gl.constexpr(COLUMNS), gl.constexpr(HEAD), gl.constexpr(QUERIES),
        gl.constexpr(K_STAGES), gl.constexpr(V_STAGES), gl.constexpr(ALTERNATE), gl.constexpr(CAUSAL),
        gl.constexpr(SCHEDULE == "general"), gl.constexpr(JOINT), gl.constexpr(ON_DEMAND),
    )  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    WARPS: gl.constexpr = 4  # of a warpgroup
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    keys, values = _tiles(DTYPE, HEAD, COLUMNS, K_STAGES, V_STAGES, ALTERNATE, LAYOUT)
    K_BARRIERS: gl.constexpr = key_barriers(ALTERNATE, K_STAGES)
    HOLDS_BACK: gl.constexpr = 0 if ALTERNATE else 1  # the producer of V
    shared = Shared(
        gl.allocate_shared_memory(DTYPE, [query_buffers(QUERIES) * GROUPS, ROWS, HEAD], LAYOUT),
        keys,
        values,
        gl.allocate_shared_memory(gl.int32, [2, 16], WORDS),
        gl.allocate_shared_memory(gl.int32, [GROUPS * DRIFT, 1], WORDS),
        _barriers(query_stages(QUERIES) * GROUPS, 1), _barriers(query_stages(QUERIES) * GROUPS, WARPS),
        _barriers(K_BARRIERS, 1), _barriers(K_BARRIERS, GROUPS * WARPS + HOLDS_BACK), _barriers(DRIFT, 1),
        _barriers(DRIFT, GROUPS * WARPS), _barriers(2, WARPS), _barriers(2, 1), _barriers(2, GROUPS * WARPS + 1),
        _barriers(GROUPS * DRIFT, 1),
    )  # fmt: skip
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (call, shared, 0, SCHEDULE, DTYPE, SPECULATIVE)),
            (_consume, (call, shared, 1, SCHEDULE, DTYPE, SPECULATIVE)),
            (produce_keys, (call, shared)),
            (produce_values, (call, shared)),
        ], [4, 1, 1], [CONSUMER_REGISTERS, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (call, shared, 0, SCHEDULE, DTYPE, SPECULATIVE)),
            (_consume, (call, shared, 1, SCHEDULE, DTYPE, SPECULATIVE)),
            (_consume, (call, shared, 2, SCHEDULE, DTYPE, SPECULATIVE)),
            (produce_keys, (call, shared)),
            (produce_values, (call, shared)),
        ], [4, 4, 1, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24, 24])  # fmt: skip
