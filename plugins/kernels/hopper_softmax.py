"""Pieces of the online softmax in registers: layouts, one update, masks, the epilogue.

Scores are kept in log2 units (scores * scale * log2(e)). A thread holds parts of two rows; row sums stay per thread
until the epilogue, so that no shuffle is paid per tile for them, or come with the product with V (`hopper_product`).

Exponents are relative to a `reference`: the running maximum, or one that follows it only when it is LAG behind, because
multiplying the output costs as much as a quarter of a tile's softmax and in most tiles no maximum rises. What is summed
and what is multiplied with V carry the same factor, so nothing but rounding changes. Decisions use the true maximum.
"""

from hopper_common import (
    COUNTS_128_ROWS,
    HAS_COUNTS,
    HAS_LSE,
    HAS_SINKS,
    NEVER_VOTES,
    TILE_COLUMNS,
    UNSEEN,
)
from hopper_queries import first_row, output_buffer, output_sent
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

LAG = gl.constexpr(8.0)  # log2 units a reference may lag behind: probabilities stay below 2**8, fit for float16
OUTGROWN = gl.constexpr(2.0**8)  # of a thread's sum over a row of a tile: below it no probability is larger


@gluon.constexpr_function
def scores_layout(columns):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def rows_layout(columns):
    return gl.SliceLayout(1, scores_layout(columns))


@gluon.constexpr_function
def any_asm(rows, vote):
    """`vote` on whether any of the bools of a thread holds, which are one for every 32 rows."""
    join = "".join(f" or.b32 any, any, ${n + 2};" for n in range(rows // 32 - 1))
    return (
        f"{{ .reg .pred wanted; .reg .b32 any; mov.b32 any, $1;{join} setp.ne.b32 wanted, any, 0;"
        f" {vote} selp.s32 $0, 1, 0, wanted; }}"
    )


@gluon.constexpr_function
def _warp_vote_asm(rows):
    return any_asm(rows, "vote.sync.any.pred wanted, wanted, 0xffffffff;")


@gluon.jit
def partial_sums(p):
    """Row sums over the columns a thread holds: `[rows, 4]`, one per thread of a quad."""
    return gl.sum(gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.constexpr_function
def _tree(operation, names, target):
    """Steps that leave in `target`, and in registers named after it, what `operation` makes of all `names`.

    Three at a time: of two steps in a row ptxas makes one instruction.
    """
    steps, count = [], 0
    while len(names) > 1:
        results = []
        for first, *others in (names[at : at + 3] for at in range(0, len(names), 3)):
            result = f"{target}_{count}" if len(names) > 3 else target
            count += 1
            steps.append(f".reg .b32 {result}; mov.b32 {result}, {first};")
            steps += [f"{operation} {result}, {result}, {other};" for other in others]
            results.append(result)
        names = results
    return steps


@gluon.constexpr_function
def _maxima_asm(rows, columns):
    """A maximum for each of a thread's rows, two of every 64, of which it holds two columns in eight."""
    shares = range(rows // 32)
    score = len(shares)  # operand of the first score
    steps = ["{ .reg .pred some, negative;"]
    lows = []
    for share in shares:
        first = score + share // 2 * (columns // 2) + share % 2 * 2
        names = [f"x{first + 4 * n + m}" for n in range(columns // 8) for m in range(2)]
        steps += [f".reg .b32 {name}; mov.b32 {name}, ${name[1:]};" for name in names]
        steps += _tree("max.s32", names, f"high{share}")
        lows += _tree("min.s32", names, f"low{share}")
        lows.append(f"setp.lt.s32 negative, high{share}, 0; selp.b32 ${share}, low{share}, high{share}, negative;")
    steps += [f"mov.b32 ${share}, high{share};" for share in shares]
    steps += _tree("min.s32", [f"high{share}" for share in shares], "least")
    steps.append("setp.lt.s32 some, least, 0; vote.sync.any.pred some, some, 0xffffffff; @!some bra settled;")
    return " ".join([*steps, *lows, "settled: }"])


@gluon.constexpr_function
def _maxima_constraints(rows, columns):
    return ",".join(["=&f"] * (rows // 32) + ["f"] * (rows * columns // 128))


@gluon.jit
def partial_maxima(scores):
    """Row maxima over the columns a thread holds, as `partial_sums`: no thread waits for another.

    Of integers three can be compared at once. The bits of numbers that are not negative have their order, those of
    negative ones the reverse. So a thread's largest integer is its maximum, unless all are negative: then, in a branch
    that is taken by whole warps, it is the smallest.
    """
    ASM: gl.constexpr = _maxima_asm(scores.shape[0], scores.shape[1])
    CONSTRAINTS: gl.constexpr = _maxima_constraints(scores.shape[0], scores.shape[1])
    SHARES: gl.constexpr = partial_sums(scores).type
    return gl.inline_asm(ASM, CONSTRAINTS, [scores], SHARES, is_pure=False)


@gluon.jit
def raised(m, maxima):
    """The running maximum of every row, with `maxima` of a tile."""
    return gl.maximum(m, gl.convert_layout(gl.max(maxima, 1), m.type.layout))


@gluon.jit
def halves(x, LAYOUT: gl.constexpr):
    """The two halves of the columns; no data moves."""
    first, second = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
    return gl.convert_layout(first, LAYOUT, assert_trivial=True), gl.convert_layout(second, LAYOUT, assert_trivial=True)


@gluon.jit
def no_sums(call):
    """Of nothing: `[rows, 8]`, all columns alike, where V has columns of ones, else as `partial_sums`."""
    if call.ONES:
        return gl.full([call.ROWS, 8], 0.0, gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))
    else:
        return _no_partial_sums(call)


@gluon.jit
def _no_partial_sums(call):
    return partial_sums(gl.full([call.ROWS, call.COLUMNS], 0.0, gl.float32, scores_layout(call.COLUMNS)))


@gluon.jit
def any_row_of_warp(wants):
    """1 if `wants` (a bool a thread and 32 rows) holds anywhere in this warp, else 0."""
    ASM: gl.constexpr = _warp_vote_asm(wants.shape[0])
    return gl.inline_asm(ASM, ("=r", "r"), [wants.to(gl.int32)], gl.int32, is_pure=False)


@gluon.jit
def finite(call, reference):
    """What a reference counts as in exponents: 0 where it is -inf (`first_maximum`), because -inf - -inf is NaN."""
    if call.GENERAL:
        return gl.where(reference == float("-inf"), 0.0, reference)
    else:
        return reference


@gluon.jit
def exponentials(scores, scale, shift):
    """2 ** (scores * scale - shift)."""
    return gl.exp2(scores * scale - gl.convert_layout(shift, gl.SliceLayout(1, scores.type.layout))[:, None])


@gluon.jit
def soften(call, scores, scale, shift, acc, DTYPE: gl.constexpr):
    """`(operand, sums)` of some columns: 2 ** (scores - shift) for the product with V, and its row sums."""
    p = exponentials(scores, scale, shift)
    SUMS: gl.constexpr = no_sums(call).type.layout
    return as_operand(p, acc, DTYPE), gl.convert_layout(partial_sums(p), SUMS, assert_trivial=True)


@gluon.jit
def for_shares(row, shares):
    """A value per row beside `shares`: `[rows, 4]`, one per thread of a quad."""
    return gl.convert_layout(row, gl.SliceLayout(1, shares.type.layout))[:, None]


@gluon.jit
def scale_sums(sums, alpha):
    return sums * for_shares(alpha, sums)


@gluon.jit
def rescale(acc, alpha):
    ACC: gl.constexpr = acc.type.layout
    return acc * gl.convert_layout(alpha, gl.SliceLayout(1, ACC))[:, None]


@gluon.jit
def outgrows(maxima, reference):
    """1 if some score of the warp is LAG beyond its row's reference; of -inf, which has seen nothing, all are."""
    return any_row_of_warp(maxima > for_shares(reference + LAG, maxima))


@gluon.jit
def as_operand(p, acc, DTYPE: gl.constexpr):
    """Probabilities as the register operand of the product with V; same registers, no data movement.

    Rounded by inline assembly, which the compiler leaves where it stands. Where both sides of a branch end in a
    conversion, it would make one of them behind the branch, and keep twice the registers until there.
    """
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    if gl.float16 == DTYPE:
        p = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.float16, is_pure=True, pack=2
        )
    else:
        p = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    return gl.convert_layout(p, OPERAND)


@gluon.jit
def hide_columns(scores, column0, visible, COLUMNS: gl.constexpr):
    """-inf where the column is not below the row's number of visible columns.

    A thread's columns are 2 * (lane % 4) plus what only the register says: with the lane's part moved to the other
    side, every comparison is with a constant.
    """
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, scores_layout(COLUMNS)))
    visible = gl.convert_layout(visible, rows_layout(COLUMNS))
    limit = (visible - column0)[:, None] - (columns & 6)[None, :]
    return gl.where((columns & ~6)[None, :] < limit, scores, float("-inf"))


@gluon.jit
def first_maximum(call, item, rows):
    """Running maximum before the first tile, and for rows that do not exist a value that never votes.

    UNSEEN needs no care in exponents. Scores below it, which take factors of 1e14 and more, count as hidden. A bias may
    lie below it, so where there can be one it is -inf.
    """
    FIRST: gl.constexpr = float("-inf") if call.GENERAL else UNSEEN
    return gl.where(item.has(rows), FIRST, NEVER_VOTES)


@gluon.jit
def store_output(call, shared, item, sequence, ticket, acc, reference, sums, DTYPE: gl.constexpr):
    """Normalises and writes the warpgroup's rows; the copy engine clips what lies beyond the tensor."""
    ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    first = first_row(call, item, ticket)
    rows = first + gl.arange(0, call.ROWS, rows_layout(call.COLUMNS))
    total = gl.convert_layout(gl.max(sums, 1) if call.ONES else gl.sum(sums, 1), rows.type.layout)
    if call.has(HAS_LSE):
        value = gl.where(total > 0, (reference + gl.log2(total)) * 0.6931471805599453, float("-inf"))
        place = (item.batch * call.heads_q + item.head).to(gl.int64) * call.seq_q
        value = gl.where(item.has(rows), value, float("-inf"))
        gl.store(call.lse + place + rows, value, mask=(rows >= 0) & (rows < call.seq_q))
    weight = total
    if call.has(HAS_SINKS):
        sink = gl.load(call.sinks + item.head).to(gl.float32) * 1.4426950408889634
        weight = total + gl.exp2(sink - reference)
    weight = gl.where((total > 0) & item.has(rows), 1.0 / weight, 0.0)
    empty = any_row_of_warp(weight == 0.0)
    weight = gl.convert_layout(weight, ROWS)[:, None]
    acc = acc * weight
    if empty > 0:  # a row without weight is zero whatever a NaN in V made of its sum
        acc = gl.where(weight == 0.0, 0.0, acc)
    out = acc.to(DTYPE)
    stage = output_buffer(call, shared, sequence, ticket)
    stage.store(out)
    fence_async_shared()
    if call.CAUSAL:  # below 0 the copy engine traps; beyond the end it writes nothing
        first = gl.where(first < 0, call.seq_q, first)
    tma.async_store(call.o, [item.batch, item.head, first, 0], stage)
    output_sent(call, shared, sequence, ticket)


@gluon.jit
def tiles_seen(call, item, first, rows):
    """Leading tiles in which some of so many rows from `first` on sees something.

    For kernels in which what a row sees is a number of columns, and never fewer than the row before.
    """
    last = gl.minimum(first + rows, item.q_end) - 1
    return gl.where((first >= 0) & (last >= first), gl.cdiv(item.visible_columns(call, last), TILE_COLUMNS), 0)


@gluon.jit
def existing_tiles(call, item, ticket):
    """Tiles of the decision that begins with this warpgroup's rows; 0 where none begins there."""
    first = first_row(call, item, ticket)
    rows = gl.where(call.has(COUNTS_128_ROWS), 128, 64)
    return gl.where(first % rows == 0, tiles_seen(call, item, first, rows), 0)


@gluon.jit
def add_counts(call, shared, item, skipped, exist):
    write = exist > 0
    if call.JOINT:
        write = write & (shared.group == 0)
    gl.atomic_add(call.counts + item.head * 2, skipped, mask=write, sem="relaxed")
    gl.atomic_add(call.counts + item.head * 2 + 1, exist, mask=write, sem="relaxed")


@gluon.jit
def count_kept(call, shared, item, ticket, kept):
    """Adds an item's tiles to the counts, if they are asked for."""
    if call.has(HAS_COUNTS):
        exist = existing_tiles(call, item, ticket)
        add_counts(call, shared, item, exist - kept, exist)


@gluon.jit
def count_all(call, shared, item, ticket):
    """The same where no tile is skipped."""
    if call.has(HAS_COUNTS):
        add_counts(call, shared, item, 0, existing_tiles(call, item, ticket))
