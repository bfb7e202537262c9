"""Counting tiles: per head, per phase, over calls and threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparse_attention.statistics import LayerStatistics, TileCounts, phase_of, total_sparsity


def counts(*heads: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(heads, dtype=torch.int32)


def test_sparsity_of_heads_and_layers_weighs_by_tiles() -> None:
    small, large = TileCounts.of(counts((1, 2), (0, 2))), TileCounts.of(counts((30, 40)))
    assert small.skipped == (1, 0) and small.total == (2, 2) and small.sparsity == 0.25
    assert total_sparsity([small, large]) == pytest.approx(31 / 44)
    assert total_sparsity([]) == 0.0 and TileCounts((0,), (0,)).sparsity == 0.0


def test_calls_add_up_by_phase_and_are_forgotten() -> None:
    statistics = LayerStatistics()
    assert statistics.by_phase == {}
    statistics.add("prefill", counts((1, 2), (3, 4)))
    statistics.add("prefill", counts((10, 20), (30, 40)))
    statistics.add("decode", counts((5, 5), (0, 5)))
    assert statistics.by_phase["prefill"] == TileCounts((11, 33), (22, 44))
    assert statistics.by_phase["decode"] == TileCounts((5, 0), (5, 5))
    statistics.reset()
    assert statistics.by_phase == {}


def test_many_calls_do_not_overflow() -> None:
    """One call counts in int32; a long run does not."""
    statistics = LayerStatistics()
    for _ in range(3):
        statistics.add("prefill", counts((2**31 - 1, 2**31 - 1)))
    assert statistics.by_phase["prefill"].total == (3 * (2**31 - 1),)


def test_reading_gives_values_that_later_calls_do_not_change() -> None:
    statistics = LayerStatistics()
    given = counts((1, 2))
    statistics.add("prefill", given)
    before = statistics.by_phase["prefill"]
    given += 5  # the op may reuse its buffer
    statistics.add("prefill", counts((1, 2)))
    assert before == TileCounts((1,), (2,))
    assert statistics.by_phase["prefill"] == TileCounts((2,), (4,))


def test_threads_lose_no_count() -> None:
    statistics = LayerStatistics()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: statistics.add("decode", counts((1, 3))), range(400)))
    assert statistics.by_phase["decode"] == TileCounts((400,), (1200,))


def test_copies_count_for_themselves() -> None:
    statistics = LayerStatistics()
    statistics.add("prefill", counts((1, 2)))
    other = copy.deepcopy(statistics)
    other.add("prefill", counts((1, 2)))
    assert statistics.by_phase["prefill"].total == (2,) and other.by_phase["prefill"].total == (4,)


def test_decode_is_one_row() -> None:
    assert [phase_of(rows) for rows in (1, 2, 128)] == ["decode", "prefill", "prefill"]
