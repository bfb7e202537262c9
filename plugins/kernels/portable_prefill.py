"""The prefill kernel in plain Triton, for every GPU with tensor cores and cp.async (compute capability 8.0 and later).

One program computes one row block of one head, which is also the block of the decision, so a vote is a maximum over
the program's rows. K of the next tile is copied to shared memory while the current one is voted on and used; V is read
inside the branch, only where the tile is kept. A threshold of zero keeps every tile through the same instructions, so
dense is not a kernel of its own.

Every product works on 64 x 64 pieces of K and V: the warps then lie along the rows, a row's maximum stays within a
warp, and heads of 64, 128 and 256 share the code. Scores are kept in log2 units (score * log2(e)).
"""

import triton
import triton.language as tl
from plain_common import (
    HAS_ADDITIVE_BIAS,
    HAS_BOOL_BIAS,
    HAS_COUNTS,
    HAS_LSE,
    HAS_SINKS,
    IS_CAUSAL,
    LN_2,
    LOG2_E,
    batch_entry,
    log2_threshold,
    seen_by,
)

TILE = tl.constexpr(128)  # key columns of a decision
PIECE = tl.constexpr(64)  # columns of K and V, and of the head, of one product; a tile has two
Q_STAYS = tl.constexpr(2)  # pieces of a head up to which Q stays in shared memory


@triton.jit
def place(index, row_blocks, heads, section, given):
    """`(head of the batch, row block)` of a program.

    Full attention goes head by head, so that programs that run together read the same K and V; causal attention begins
    with the longest blocks, within a section of heads.
    """
    head = index // row_blocks
    block = index % row_blocks
    if (given & IS_CAUSAL) != 0:
        first = index // (section * row_blocks) * section
        width = tl.minimum(section, heads - first)
        rest = index - first * row_blocks
        head = first + rest % width
        block = row_blocks - 1 - rest // width
    return head, block


@triton.jit
def load_rows(base, rows, stride, element, seq, size):
    """64 elements, from `element` on, of the rows of Q; zeros beyond `seq` and `size`."""
    elements = element + tl.arange(0, PIECE)
    inside = (rows < seq)[:, None] & (elements < size)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + elements[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, rows, stride, element, seq, size, acc, weight):
    """Writes the output's 64 elements from `element` on; what lies beyond `seq` and `size` stays untouched."""
    elements = element + tl.arange(0, PIECE)
    inside = (rows < seq)[:, None] & (elements < size)[None, :]
    # a row without weight is zero, whatever NaN made of its sum
    out = tl.where((weight == 0.0)[:, None], 0.0, acc * weight[:, None]).to(base.dtype.element_ty)
    tl.store(base + rows.to(tl.int64)[:, None] * stride + elements[None, :], out, mask=inside)


@triton.jit
def load_piece(base, row, stride, element, size, end, MASKED: tl.constexpr):
    """64 rows, from `row` on, and 64 elements, from `element` on, of K or V; zeros beyond `size` and, if MASKED, from
    row `end` on: what lies there may be NaN, and 0 * NaN is NaN.

    Offsets within the piece have 32 bits, which halves the registers of the addresses; longer strides are refused.
    """
    rows = tl.arange(0, PIECE)
    elements = element + tl.arange(0, PIECE)
    inside = (elements < size)[None, :]
    if MASKED:
        inside = inside & (row + rows < end)[:, None]
    offsets = (rows * stride.to(tl.int32))[:, None] + elements[None, :]
    return tl.load(base + row.to(tl.int64) * stride + offsets, mask=inside, other=0.0)


@triton.jit
def products(q, q_base, k, column, q_row, k_row, rows, seq_q, head_dim, kv_end, PARTS: tl.constexpr,
             STAGES: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Q K^T of a tile: its left and its right 64 columns.

    A head of 256 leaves no room for Q and a tile of K in shared memory. There the product runs along the head as that
    of any two matrices does, and the pieces of Q are read again for every tile.
    """
    left = tl.zeros([rows.shape[0], PIECE], tl.float32)
    right = tl.zeros([rows.shape[0], PIECE], tl.float32)
    if PARTS <= Q_STAYS:
        for part in tl.static_range(PARTS):
            keys = load_piece(k, column, k_row, part * PIECE, head_dim, kv_end, MASKED)
            left = tl.dot(q[part], keys.T, left)
        for part in tl.static_range(PARTS):
            keys = load_piece(k, column + PIECE, k_row, part * PIECE, head_dim, kv_end, MASKED)
            right = tl.dot(q[part], keys.T, right)
    else:
        for part in tl.range(0, tl.cdiv(head_dim, PIECE), num_stages=STAGES):
            queries = load_rows(q_base, rows, q_row, part * PIECE, seq_q, head_dim)
            left_keys = load_piece(k, column, k_row, part * PIECE, head_dim, kv_end, MASKED)
            right_keys = load_piece(k, column + PIECE, k_row, part * PIECE, head_dim, kv_end, MASKED)
            left = tl.dot(queries, left_keys.T, left)
            right = tl.dot(queries, right_keys.T, right)
    return left, right


@triton.jit
def logits(scores, rows, column, seq_q, seq_k, scale_log2, softcap_log2, softcap_rate, bias, bias_bool, bias_row,
           bias_column, given, HIDDEN: tl.constexpr):  # fmt: skip
    """64 columns of Q K^T in log2 units, with soft-cap and bias."""
    if softcap_log2 > 0:
        scores = softcap_log2 * (1.0 - 2.0 / (tl.exp2(scores * softcap_rate) + 1.0))
    else:
        scores = scores * scale_log2
    if (given & (HAS_ADDITIVE_BIAS | HAS_BOOL_BIAS)) != 0:
        columns = column + tl.arange(0, PIECE)
        offsets = rows.to(tl.int64)[:, None] * bias_row + columns.to(tl.int64)[None, :] * bias_column
        inside = (rows < seq_q)[:, None] & (columns < seq_k)[None, :]
        if (given & HAS_BOOL_BIAS) != 0:
            attend = tl.load(bias_bool + offsets, mask=inside, other=0)
            scores = tl.where(attend != 0, scores, float("-inf"))
        else:
            added = tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)
            scores = tl.where(added > HIDDEN, scores + added * LOG2_E, float("-inf"))
    return scores


@triton.jit
def load_values(v, column, v_row, head_dim_v, kv_end, PARTS: tl.constexpr, MASKED: tl.constexpr):
    """64 rows of V, in pieces."""
    pieces = ()
    for part in tl.static_range(PARTS):
        pieces += (load_piece(v, column, v_row, part * PIECE, head_dim_v, kv_end, MASKED),)
    return pieces


@triton.jit
def add_columns(scores, scale, shift, sums, acc, values, PARTS: tl.constexpr):
    """Adds 64 columns to the row sums and to the output."""
    p = tl.exp2(scores * scale - shift[:, None])
    sums += tl.sum(p, 1)
    p = p.to(values[0].dtype)
    result = ()
    for part in tl.static_range(PARTS):
        result += (tl.dot(p, values[part], acc[part]),)
    return sums, result


@triton.jit
def attend(
    q, q_base, k, v, m, sums, acc, kept, exist, first, end, rows, q_end, start, window, kv_end, seq_q, seq_k, head_dim,
    head_dim_v, q_row, k_row, v_row, scale_log2, least, softcap_log2, softcap_rate, bias, bias_bool, bias_row,
    bias_column, given, HIDDEN: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, GENERAL: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles `first` to `end` of the row block; those that are kept change m, sums and acc."""
    row_exists = rows < q_end
    low, high = seen_by(rows, kv_end, q_end, start, window, given)
    for tile in tl.range(first, end, num_stages=STAGES if PARTS <= Q_STAYS else 1):
        column = tile * TILE
        left, right = products(q, q_base, k, column, q_row, k_row, rows, seq_q, head_dim, kv_end, PARTS, STAGES, MASKED)
        scale = scale_log2
        if GENERAL:
            left = logits(left, rows, column, seq_q, seq_k, scale_log2, softcap_log2, softcap_rate, bias, bias_bool,
                          bias_row, bias_column, given, HIDDEN)  # fmt: skip
            right = logits(right, rows, column + PIECE, seq_q, seq_k, scale_log2, softcap_log2, softcap_rate, bias,
                           bias_bool, bias_row, bias_column, given, HIDDEN)  # fmt: skip
            scale = 1.0
        if MASKED:
            columns = (column + tl.arange(0, PIECE))[None, :]
            left = tl.where(columns < high[:, None], left, float("-inf"))
            right = tl.where(columns + PIECE < high[:, None], right, float("-inf"))
            if GENERAL:
                left = tl.where(columns >= low[:, None], left, float("-inf"))
                right = tl.where(columns + PIECE >= low[:, None], right, float("-inf"))
        highest = tl.maximum(tl.max(left, 1), tl.max(right, 1)) * scale

        # 0: the row sees nothing here; 1: it would skip the tile; 2: it wants it, as the first that sees anything does
        sees = row_exists & (highest > float("-inf"))
        vote = tl.max(tl.where(sees, 1 + (highest - m >= least).to(tl.int32), 0), 0)
        exist += (vote > 0).to(tl.int32)
        if vote == 2:
            # all of V at once, so that its latency is waited for once; a head of 256 has no registers for that
            left_values = load_values(v, column, v_row, head_dim_v, kv_end, PARTS, MASKED)
            if PARTS <= Q_STAYS:
                right_values = load_values(v, column + PIECE, v_row, head_dim_v, kv_end, PARTS, MASKED)
            new_m = tl.maximum(m, highest)
            shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # has seen nothing: -inf - -inf would be NaN
            alpha = tl.exp2(m - shift)
            m = new_m
            sums = sums * alpha
            scaled = ()
            for part in tl.static_range(PARTS):
                scaled += (acc[part] * alpha[:, None],)
            sums, scaled = add_columns(left, scale, shift, sums, scaled, left_values, PARTS)
            if PARTS > Q_STAYS:
                right_values = load_values(v, column + PIECE, v_row, head_dim_v, kv_end, PARTS, MASKED)
            sums, acc = add_columns(right, scale, shift, sums, scaled, right_values, PARTS)
            kept += 1
    return m, sums, acc, kept, exist


@triton.jit
def portable_prefill(
    q, k, v, o, kv_lengths, q_start, q_lengths, threshold_scale, sinks, counts, lse, bias, bias_bool,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    bias_batch, bias_head, bias_row, bias_column, given, heads_q, group, seq_q, seq_k, head_dim, head_dim_v, row_blocks,
    heads, section, scale_log2, threshold, threshold_factor, window, softcap_log2, softcap_rate,
    HEAD: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, GENERAL: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = HEAD // PIECE
    HIDDEN: tl.constexpr = -32752.0 if q.dtype.element_ty == tl.float16 else -1.6947657e38  # finfo(dtype).min / 2
    entry, block = place(tl.program_id(0), row_blocks, heads, section, given)
    batch = (entry // heads_q).to(tl.int64)
    head = (entry % heads_q).to(tl.int64)
    kv_head = head // group
    kv_end, q_end, start = batch_entry(kv_lengths, q_start, q_lengths, batch, seq_q, seq_k, given)
    least = log2_threshold(threshold, threshold_factor, threshold_scale, kv_end, given)

    row0 = block * ROWS
    rows = row0 + tl.arange(0, ROWS)
    row_exists = rows < q_end
    first_low, first_high = seen_by(row0, kv_end, q_end, start, window, given)
    _, last_high = seen_by(tl.minimum(row0 + ROWS, q_end) - 1, kv_end, q_end, start, window, given)
    end = tl.where(row0 < q_end, tl.cdiv(tl.maximum(last_high, 0), TILE), 0)

    q_base = q + batch * q_batch + head * q_head
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    o += batch * o_batch + head * o_head
    bias += batch * bias_batch + head * bias_head
    bias_bool += batch * bias_batch + head * bias_head
    pieces = ()
    acc = ()
    for part in tl.static_range(PARTS):
        if PARTS <= Q_STAYS:
            pieces += (load_rows(q_base, rows, q_row, part * PIECE, seq_q, head_dim),)
        acc += (tl.zeros([ROWS, PIECE], tl.float32),)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    kept = 0
    exist = 0

    if GENERAL:
        first = tl.minimum(first_low // TILE, end)
    else:  # the tiles before `first` are seen whole by every row
        first = tl.minimum(tl.maximum(first_high, 0) // TILE, end)
        m, sums, acc, kept, exist = attend(
            pieces, q_base, k, v, m, sums, acc, kept, exist, 0, first, rows, q_end, start, window, kv_end, seq_q,
            seq_k, head_dim, head_dim_v, q_row, k_row, v_row, scale_log2, least, softcap_log2, softcap_rate, bias,
            bias_bool, bias_row, bias_column, given, HIDDEN, PARTS, STAGES, GENERAL, False,
        )  # fmt: skip
    m, sums, acc, kept, exist = attend(
        pieces, q_base, k, v, m, sums, acc, kept, exist, first, end, rows, q_end, start, window, kv_end, seq_q, seq_k,
        head_dim, head_dim_v, q_row, k_row, v_row, scale_log2, least, softcap_log2, softcap_rate, bias, bias_bool,
        bias_row, bias_column, given, HIDDEN, PARTS, STAGES, GENERAL, True,
    )  # fmt: skip

    has_weight = row_exists & (sums > 0)
    if (given & HAS_LSE) != 0:
        value = tl.where(has_weight, (m + tl.log2(sums)) * LN_2, float("-inf"))
        tl.store(lse + (batch * heads_q + head) * seq_q + rows, value, mask=rows < seq_q)
    total = sums
    if (given & HAS_SINKS) != 0:
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2_E - m)
    weight = tl.where(has_weight, 1.0 / total, 0.0)
    for part in tl.static_range(PARTS):
        store_rows(o, rows, o_row, part * PIECE, seq_q, head_dim_v, acc[part], weight)
    if (given & HAS_COUNTS) != 0:
        tl.atomic_add(counts + 2 * head, exist - kept, sem="relaxed")
        tl.atomic_add(counts + 2 * head + 1, exist, sem="relaxed")
