"""The product with V and the row sums of P, in one of two ways (Call.ONES).

In both P is made and multiplied in pieces of a tile's columns, and each piece's product runs under the exponentials of
the next.

with ones: V has eight more columns, of ones, so the tensor cores add up the rows of P beside the product, 64 x 72
instead of 64 x 64 at a time. That saves one addition for every score, an eighth of a tile's instructions. The columns
are not in V's buffer: a descriptor says how far it is from 64 columns to the next, and this one says how far it is to
16 rows of ones. What is summed is P as it is multiplied, rounded.

apart: the threads add, each its columns, and the sums of a quad meet in the epilogue (`hopper_softmax`).
"""

import itertools

from hopper_common import await_turn, give_turn
from hopper_softmax import exponentials, halves, scores_layout, soften
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

ONES_KEYS = gl.constexpr(16)  # of one product
ONES_COLUMNS = gl.constexpr(64)  # of which the product reads eight
LOWER = gl.constexpr(0xFFFF)  # V 16 bytes further on: one more in the low half of a word, one less in the high half
PANEL_KEY = gl.constexpr(8)  # a key's 64 columns, in units of 16 bytes


@gluon.jit
def allocate_ones(queries, DTYPE: gl.constexpr, LAYOUT: gl.constexpr, ONES: gl.constexpr):
    """The ones, behind K and V in shared memory; where there are none, something else."""
    if ONES:
        ones = gl.allocate_shared_memory(DTYPE, [ONES_KEYS, ONES_COLUMNS], LAYOUT)
        spread: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        ones.store(gl.full([ONES_KEYS, ONES_COLUMNS], 1.0, DTYPE, spread))
        return ones
    else:
        return queries


@gluon.jit
def values_word(v, ones, ONES: gl.constexpr):
    """The low word of a descriptor: where the first buffer of V is, and how far the ones are from it.

    Both in units of 16 bytes. They have to lie behind V, which the build checks (`away`).
    """
    if ONES:
        return gl.inline_asm(
            "{ .reg .b32 away; sub.s32 away, $2, $1; shl.b32 away, away, 12;"
            " shr.u32 $0, $1, 4; add.s32 $0, $0, away; }",
            ("=&r", "r", "r"), [v, ones], gl.int32, is_pure=False,
        )  # fmt: skip
    else:
        return gl.to_tensor(0)


@gluon.jit
def pieces(scores, COLUMNS: gl.constexpr):
    """The scores, so many columns each."""
    if scores.shape[1] == COLUMNS:
        return (scores,)
    else:
        first, second = halves(scores, scores_layout(scores.shape[1] // 2))
        return pieces(first, COLUMNS) + pieces(second, COLUMNS)


@gluon.constexpr_function
def _product_asm(dtype, rows, columns, head, tile_columns, lower, panel_key):
    """Rounds P to the dtype and issues its product: for 16 keys, 64 rows and 64 columns of V each one instruction.

    Operands: output and sums, P, output and sums again, the low word of the first descriptor. The high word says that
    rows of 128 bytes are swizzled, and that eight of them follow each other.
    """
    kind = "f16" if dtype == gl.float16 else "bf16"
    blocks, panels, slices = rows // 64, head // 64, columns // 16
    sums = 32 * blocks * panels  # the first register of them; a thread has 32 for every 64 x 64
    p = sums + 4 * blocks
    word = 2 * p + 8 * slices * blocks
    steps = ["{ .reg .b32 low; .reg .b64 at; .reg .pred yes; setp.eq.u32 yes, 0, 0;",
             f".reg .b32 pair<{4 * slices * blocks}>;"]  # fmt: skip
    for n in range(4 * slices * blocks):
        steps.append(f"cvt.rn.{kind}x2.f32 pair{n}, ${p + 2 * n + 1}, ${p + 2 * n};")
    steps.append("wgmma.fence.sync.aligned;")
    for block, k, panel in itertools.product(range(blocks), range(slices), range(panels)):
        left = ", ".join(f"pair{4 * (slices * block + k) + n}" for n in range(4))
        first = 32 * (panels * block + panel)
        into = [f"${n}" for n in range(first, first + 32)]
        if panel == panels - 1:
            into += [f"${n}" for n in range(sums + 4 * block, sums + 4 * block + 4)]
        away = (16 * k + tile_columns * panel) * panel_key
        steps.append(f"add.s32 low, ${word}, {-lower * away}; mov.b64 at, {{low, 0x40000040}};")
        steps.append(f"wgmma.mma_async.sync.aligned.m64n{2 * len(into)}k16.f32.{kind}.{kind}"
                     f" {{{', '.join(into)}}}, {{{left}}}, at, yes, 1, 1, 1;")  # fmt: skip
    return " ".join([*steps, "wgmma.commit_group.sync.aligned; }"])


@gluon.constexpr_function
def _in_place(rows, head, inputs):
    """Constraints: output and sums are written where they were read, behind so many other inputs."""
    count = rows // 64 * (head // 2 + 4)
    return ",".join(["=f"] * count + ["f"] * inputs + [str(n) for n in range(count)])


@gluon.jit
def multiply_with_ones(call, shared, scores, scale, shift, slot, acc, sums, TURNS: gl.constexpr, DTYPE: gl.constexpr):
    """Issues the products of a tile with V in that slot: output and sums in flight, until `await_products`.

    TURNS: two warpgroups take turns at the first pieces, see `consume_skip`: half of them or, where each has 128 rows,
    three quarters, as measured (README.md).
    """
    PIECE: gl.constexpr = call.COLUMNS // call.PIECES
    ASM: gl.constexpr = _product_asm(DTYPE, call.ROWS, PIECE, call.HEAD, call.COLUMNS, LOWER, PANEL_KEY)
    CONSTRAINTS: gl.constexpr = _in_place(call.ROWS, call.HEAD, call.ROWS * PIECE // 128) + ",r"
    word = shared.values_word - LOWER * (slot * (call.COLUMNS * call.HEAD // 8))
    IN_TURN: gl.constexpr = call.PIECES * 3 // 4 if call.ROWS == 128 else call.PIECES // 2
    parts = pieces(scores, PIECE)
    if TURNS:
        await_turn(shared.group)
    for n in gl.static_range(scores.shape[1] // PIECE):
        p = exponentials(parts[n], scale, shift)
        acc, sums = gl.inline_asm(
            ASM, CONSTRAINTS, [p, acc, sums, word - LOWER * (n * PIECE * PANEL_KEY)], (acc.type, sums.type),
            is_pure=False,
        )  # fmt: skip
        if TURNS and n == IN_TURN - 1:
            give_turn(1 - shared.group)
    return acc, sums


@gluon.jit
def await_products(call, acc, sums):
    """Output and sums, when all products are done."""
    CONSTRAINTS: gl.constexpr = _in_place(call.ROWS, call.HEAD, 0)
    return gl.inline_asm(
        "wgmma.wait_group.sync.aligned 0;", CONSTRAINTS, [acc, sums], (acc.type, sums.type), is_pure=False
    )


@gluon.jit
def multiply(call, shared, scores, scale, shift, slot, acc, DTYPE: gl.constexpr):
    """Issues the products of a tile with V in that slot: the output in flight, and the sums to be added."""
    PIECE: gl.constexpr = call.COLUMNS // 4
    values = shared.v.index(slot)
    parts = pieces(scores, PIECE)
    product, sums = acc, ()
    for n in gl.static_range(4):
        p, more = soften(call, parts[n], scale, shift, acc, DTYPE)
        product = warpgroup_mma(p, values.slice(n * PIECE, PIECE, dim=0), product, is_async=True)
        sums = sums + (more,)  # noqa: RUF005 (Triton does not unpack)
    return product, (sums[0] + sums[1]) + (sums[2] + sums[3])
