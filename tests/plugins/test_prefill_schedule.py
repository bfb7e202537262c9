"""The schedule of the prefill kernels, emulated: which kernel a call runs, its work items, and who waits for whom."""

from __future__ import annotations

import heapq
import math
from typing import Any

import pytest
import torch
from emulated_assembly import MACHINE
from emulated_checks import TOLERANCE, check, inputs
from emulation import Emulation, row_blocks, work_items
from planted import THRESHOLD, WIDE_CALLS, WIDE_KERNELS

from sparse_attention import native
from sparse_attention.reference import attention


@pytest.mark.parametrize(
    ("heads", "rows", "size", "br", "expected"),
    [
        (66, 256, 64, 128, "skip"),  # 132 blocks of 128 rows: one for every multiprocessor of an H100
        (67, 256, 64, 128, "wide"),  # 67 blocks of 256
        (67, 257, 64, 128, "skip"),  # 134 blocks of 256 would take two rounds
        (67, 192, 64, 64, "wide"),  # 67 blocks of 192
        (67, 193, 64, 64, "skip"),
        (67, 192, 128, 64, "wide"),
        (67, 192, 128, 128, "skip"),  # no other kernel decides 128 rows there
        (4000, 128, 128, 64, "skip"),  # a third of 192 rows would be empty
        (4000, 1920, 128, 64, "wide"),
        *((128, rows, size, br, "wide") for rows, _ in WIDE_CALLS for size, br in WIDE_KERNELS),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_the_rows_of_a_work_item_follow_the_size_of_the_call(
    emulation: Emulation, heads: int, rows: int, size: int, br: int, expected: str, causal: bool
) -> None:
    memory = torch.empty(8 * (heads + rows) + size, dtype=torch.float16)
    q = memory.as_strided((1, heads, rows, size), (8, 8, 8, 1))  # nothing is executed
    call = native.pack(q, q, q, q, is_causal=causal, threshold=THRESHOLD, br=br)
    assert emulation.kernels_of(call)[0].split("_")[3] == expected


@pytest.mark.parametrize(
    ("rows", "size", "br", "causal", "full"),
    [
        (1024, 64, 64, "wide", "wide"),  # six blocks of 192 rows are an eighth more than eight of 128
        (1024, 128, 64, "wide", "wide"),
        (600, 64, 64, "skip", "wide"),  # four of 192, a fifth more than five of 128
        (256, 64, 64, "skip", "skip"),  # two of either
        (1152, 64, 128, "skip", "skip"),  # five of 256, a ninth more than nine of 128
    ],
)
def test_how_many_rows_may_be_empty(
    emulation: Emulation, rows: int, size: int, br: int, causal: str, full: str
) -> None:
    """A quarter in full attention, an eighth in causal, a twentieth where 128 rows decide."""
    memory = torch.empty(8 * (4000 + rows) + size, dtype=torch.float16)
    q = memory.as_strided((1, 4000, rows, size), (8, 8, 8, 1))  # nothing is executed
    for is_causal, role in ((True, causal), (False, full)):
        call = native.pack(q, q, q, q, is_causal=is_causal, threshold=THRESHOLD, br=br)
        assert emulation.kernels_of(call)[0].split("_")[3] == role


@pytest.mark.parametrize("lam", [0.0, THRESHOLD])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("heads", "rows"), [(512, 1024), (320, 1536), (256, 2048), (200, 3000), (128, 4096), (32, 16384)]
)
def test_causal_work_ends_evenly(whole_device: Emulation, heads: int, rows: int, size: int, lam: float) -> None:
    """Taken in order by the multiprocessors of an H100, each item as long as it has tiles."""
    memory = torch.empty(8 * (heads + rows) + size, dtype=torch.float16)
    q = memory.as_strided((1, heads, rows, size), (8, 8, 8, 1))  # nothing is executed
    kernel = whole_device.kernels_of(native.pack(q, q, q, q, is_causal=True, threshold=lam, br=64))[0]
    spec = whole_device.specs[kernel]
    items = work_items(spec, whole_device.scalars)
    blocks = {(head, row0) for head, row0, _ in items}
    assert len(blocks) == len(items) == heads * -(-rows // spec.rows)
    assert {row0 + spec.rows for _, row0, _ in items if row0 + spec.rows >= rows} == {-(-rows // 64) * 64}
    busy = [0.0] * 132
    for _, _, tiles in items:
        heapq.heapreplace(busy, busy[0] + tiles)
    assert max(busy) <= 1.03 * sum(busy) / len(busy)


@pytest.mark.parametrize("causal", [False, True])
def test_warpgroups_that_queue_for_short_items(many_rows: Emulation, causal: bool) -> None:
    """Items of one tile, in which warpgroups run far apart: none takes Q of the item before for its own."""
    q, k, v = inputs(1, 6, 6, 400, 100, 128)
    expected = attention(q, k, v, threshold=THRESHOLD, br=64, is_causal=causal)[0]
    for seed in range(5):
        out = many_rows.run(q, k, v, seed=seed, threshold=THRESHOLD, br=64, is_causal=causal)[0]
        assert many_rows.specs[many_rows.launched[0][0]].queries == "queue"
        assert (out.float() - expected).abs().max() <= TOLERANCE[q.dtype]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("rows", [64, 192, 193, 200, 256, 257, 320, 1024, 1216])
def test_no_warpgroup_of_three_computes_alone(many_rows: Emulation, rows: int, size: int) -> None:
    """Where a head's last item would have 64 rows or fewer, the last two have two blocks each; every row has one."""
    q = torch.empty(1, 2, rows, size, dtype=torch.float16)
    (kernel,) = many_rows.kernels_of(native.pack(q, q, q, q, threshold=THRESHOLD, br=64))
    items = row_blocks(many_rows.specs[kernel], many_rows.scalars)
    blocks = [[row for row in item if row < rows] for item in items]
    assert sorted(row for item in blocks for row in item) == sorted(2 * list(range(0, rows, 64)))
    assert rows == 64 or min(map(len, blocks)) >= 2


@pytest.mark.parametrize("size", [64, 128])
def test_lengths_do_not_divide_items(many_rows: Emulation, size: int) -> None:
    """Where `q_lengths` end an entry before the items that overlap, its rows fill as few items as they can."""
    rows = 1024
    q = torch.empty(1, 2, rows, size, dtype=torch.float16)
    (kernel,) = many_rows.kernels_of(native.pack(q, q, q, q, threshold=THRESHOLD, br=64))
    for length in (0, 1, 64, 200, 832, 896, 897, 960, 961, 1024):
        items = row_blocks(many_rows.specs[kernel], many_rows.scalars, length)
        assert sorted(row for item in items for row in item if row < rows) == sorted(2 * list(range(0, rows, 64)))
        blocks = [sum(row < length for row in item) for item in items]
        assert sum(map(bool, blocks)) == 2 * math.ceil(length / 192)
        assert length <= 960 or min(blocks) == 2


@pytest.mark.parametrize("causal", [False, True])
def test_warpgroups_that_decide_together_take_turns_in_some_items(emulation: Emulation, causal: bool) -> None:
    """At every kept tile that needs no mask but an odd one, in the first item and behind one that kept all of those.

    The bits are the same in any order of events.
    """
    rows, columns = 300, 1100
    dense, sparse = (inputs(1, 2, 2, rows, columns, 128, keep=keep, seed=1) for keep in (1.0, 0.3))
    q, k, v = (torch.cat((a[:, :1], b, a[:, 1:]), 1) for a, b in zip(dense, sparse, strict=True))
    options: dict[str, Any] = {"threshold": THRESHOLD, "br": 128, "is_causal": causal}
    emulation.driver.emulated_multiprocessors(1)
    try:
        out, counts, _ = check(emulation, q, k, v, **options)
    finally:
        emulation.driver.emulated_multiprocessors(3)
    assert (counts[:, 0] > 0).tolist() == [False, True, True, False]
    kept = attention(q, k, v, **options)[1].kept[0]
    in_turn, turns, items = True, 0, []
    for head, row, tiles in work_items(emulation.specs[emulation.launched[0][0]], emulation.scalars):
        seen = row + columns - rows + 1 if causal else columns
        unmasked = min(seen // 128, tiles - 1) // 2 * 2
        items.append(in_turn)
        turns += int(kept[head, row // 128, :unmasked].sum()) if in_turn else 0
        in_turn = bool(kept[head, row // 128, :unmasked].all())
    assert any(items[1:]) and not all(items)
    taken = {number: barrier for (_, number), barrier in MACHINE[0].named.items()}
    assert [barrier.generation for barrier in taken.values()] == [turns, turns]
    assert [taken[number].counted for number in sorted(taken)] == [1, 0]  # the first's next turn is given
    for seed in (1, 2):
        assert torch.equal(out, emulation.run(q, k, v, seed=seed, **options)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_warpgroups_of_128_rows_take_turns_at_every_tile(many_rows: Emulation, causal: bool) -> None:
    """Also at those that one of them skips, or does not compute as its rows see nothing of them or do not exist."""
    q, k, v = inputs(2, 2, 1, 300, 700, 64, keep=0.4)
    counts = check(many_rows, q, k, v, threshold=THRESHOLD, br=128, is_causal=causal)[1]
    assert int(counts[:, 0].sum()) > 0
    spec = many_rows.specs[many_rows.launched[0][0]]
    assert spec.group_rows == 128
    tiles = sum(tiles for *_, tiles in work_items(spec, many_rows.scalars))
    for barrier in (12, 13):
        taken = [state.generation for (_, number), state in MACHINE[0].named.items() if number == barrier]
        assert sum(taken) == tiles


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("br", [64, 128])
def test_every_order_of_events_gives_the_same(emulation: Emulation, size: int, br: int) -> None:
    """Copies land late or early, warpgroups drift apart: same bits, no deadlock, nothing read before it is there.

    Three multiprocessors take eight items: of several items in turn, and not all of as many.
    """
    q, k, v = inputs(1, 2, 2, 450, 900, size)
    for lam in (0.0, THRESHOLD):
        first = check(emulation, q, k, v, threshold=lam, br=br, is_causal=True)[:2]
        assert (first[1][:, 0] > 0).all() == (lam > 0)
        for seed in range(1, 3):
            again = emulation.run(q, k, v, threshold=lam, br=br, is_causal=True, seed=seed)[:2]
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
