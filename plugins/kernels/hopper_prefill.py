"""The Hopper (sm_90a) prefill kernel: shared memory, barriers, and one warp role per partition."""

from hopper_common import DRIFT, Call
from hopper_dense import consume_dense
from hopper_general import consume_general
from hopper_plain import consume_plain, consume_wide
from hopper_produce import produce_keys, produce_values
from hopper_product import allocate_ones, values_word
from hopper_queries import issue_tickets, query_buffers
from hopper_shared import cell_count, init_barriers, open_shared
from hopper_skip import consume_skip
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma


@gluon.jit
def _consume(call, queries, keys, values, ones, cells, SCHEDULE: gl.constexpr, DTYPE: gl.constexpr,
             SPECULATIVE: gl.constexpr):  # fmt: skip
    shared = open_shared(queries, keys, values, cells, values_word(values, ones, call.ONES))
    if SCHEDULE == "dense":
        consume_dense(call, shared, DTYPE, SPECULATIVE)
    elif SCHEDULE == "skip":
        consume_skip(call, shared, DTYPE)
    elif SCHEDULE == "general":
        consume_general(call, shared, DTYPE)
    elif SCHEDULE == "wide":
        consume_wide(call, shared, DTYPE)
    else:
        consume_plain(call, shared, DTYPE)
    tma.store_wait(0)


@gluon.jit
def _produce(call, queries, keys, values, cells, KEYS: gl.constexpr):
    shared = open_shared(queries, keys, values, cells, gl.to_tensor(0))
    if KEYS:
        produce_keys(call, shared)
    else:
        produce_values(call, shared)


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
    seq_q, seq_k, row_blocks, first_row, heads, section, last_section, scale_log2, threshold, threshold_factor, window,
    softcap_log2, softcap_rate, bias, bias_bool, bias_batch, bias_head, bias_row, bias_column,
    DTYPE: gl.constexpr, HEAD: gl.constexpr, GROUPS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    QUERIES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, ALTERNATE: gl.constexpr,
    SCHEDULE: gl.constexpr, CAUSAL: gl.constexpr, JOINT: gl.constexpr, SPECULATIVE: gl.constexpr,
    ONES: gl.constexpr, PIECES: gl.constexpr, ON_DEMAND: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    call = Call(
        q, k, v, o, kv_lengths, q_start, q_lengths, threshold_scale, sinks, counts, lse, counter, given, heads_q, group,
        seq_q, seq_k, row_blocks, first_row, heads, section, last_section, scale_log2, threshold, threshold_factor,
        window, softcap_log2, softcap_rate, bias, bias_bool, bias_batch, bias_head, bias_row, bias_column,
        gl.constexpr(GROUPS), gl.constexpr(ROWS), gl.constexpr(COLUMNS), gl.constexpr(HEAD), gl.constexpr(QUERIES),
        gl.constexpr(K_STAGES), gl.constexpr(V_STAGES), gl.constexpr(ALTERNATE), gl.constexpr(CAUSAL),
        gl.constexpr(SCHEDULE == "general"), gl.constexpr(JOINT), gl.constexpr(ONES), gl.constexpr(PIECES),
        gl.constexpr(ON_DEMAND),
    )  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    WARPS: gl.constexpr = 4 * GROUPS  # of consumers
    CELLS: gl.constexpr = cell_count(GROUPS, QUERIES, K_STAGES, ALTERNATE, JOINT, DRIFT)
    HOLDS_BACK: gl.constexpr = 0 if ALTERNATE else 1  # the producer of V
    keys, values = _tiles(DTYPE, HEAD, COLUMNS, K_STAGES, V_STAGES, ALTERNATE, LAYOUT)
    queries = gl.allocate_shared_memory(DTYPE, [query_buffers(QUERIES, GROUPS), ROWS, HEAD], LAYOUT)
    ones = allocate_ones(queries, DTYPE, LAYOUT, ONES)
    cells = mbarrier.allocate_mbarrier(batch=CELLS)
    init_barriers(call, cells, "k_full", 1)
    init_barriers(call, cells, "k_free", WARPS + HOLDS_BACK)
    init_barriers(call, cells, "v_full", 1)
    init_barriers(call, cells, "v_free", WARPS)
    init_barriers(call, cells, "voted", 1 if JOINT else GROUPS)
    init_barriers(call, cells, "q_full", 1)
    init_barriers(call, cells, "q_free", 4)
    init_barriers(call, cells, "v_raw", 1)
    init_barriers(call, cells, "item_full", 1)
    init_barriers(call, cells, "item_free", 32 * (WARPS + 1))
    issue_tickets(call, cells)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (call, queries, keys, values, ones, cells, SCHEDULE, DTYPE, SPECULATIVE)),
            (_consume, (call, queries, keys, values, ones, cells, SCHEDULE, DTYPE, SPECULATIVE)),
            (_produce, (call, queries, keys, values, cells, True)),
            (_produce, (call, queries, keys, values, cells, False)),
        ], [4, 1, 1], [CONSUMER_REGISTERS, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (call, queries, keys, values, ones, cells, SCHEDULE, DTYPE, SPECULATIVE)),
            (_consume, (call, queries, keys, values, ones, cells, SCHEDULE, DTYPE, SPECULATIVE)),
            (_consume, (call, queries, keys, values, ones, cells, SCHEDULE, DTYPE, SPECULATIVE)),
            (_produce, (call, queries, keys, values, cells, True)),
            (_produce, (call, queries, keys, values, cells, False)),
        ], [4, 4, 1, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24, 24])  # fmt: skip
