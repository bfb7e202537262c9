"""Tile counts: how many tiles exist and how many were skipped, per layer, head and phase."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attention.threshold import Phase

_ADDING = threading.Lock()  # one model may run in several threads; not per instance, so that a model can be copied


@dataclass(frozen=True)
class TileCounts:
    """Tiles skipped and tiles that exist, per query head. Only tiles in which some row sees something exist."""

    skipped: tuple[int, ...]
    total: tuple[int, ...]

    @classmethod
    def of(cls, counts: Tensor) -> TileCounts:
        """From the op's output `[Hq, 2]` (skipped, total)."""
        skipped, total = counts.detach().to("cpu", torch.int64).unbind(-1)
        return cls(tuple(skipped.tolist()), tuple(total.tolist()))

    @property
    def sparsity(self) -> float:
        """Skipped over total, in [0, 1]; 0 where no tile exists."""
        return total_sparsity([self])


class LayerStatistics:
    """What one attention module has counted so far, by phase; summed on its device and read without stalling it."""

    def __init__(self) -> None:
        self._sums: dict[Phase, Tensor] = {}

    def add(self, phase: Phase, counts: Tensor) -> None:
        """Adds the counts `[Hq, 2]` of one call."""
        counts = counts.detach().to(torch.int64)
        with _ADDING:
            self._sums[phase] = self._sums[phase] + counts if phase in self._sums else counts

    def reset(self) -> None:
        """Forgets everything counted so far."""
        self._sums.clear()

    @property
    def by_phase(self) -> dict[Phase, TileCounts]:
        """Counts of each phase that has run."""
        return {phase: TileCounts.of(counts) for phase, counts in self._sums.items()}


def total_sparsity(counts: Iterable[TileCounts]) -> float:
    """Sparsity over all given counts together: skipped tiles over existing tiles, in [0, 1]."""
    skipped = total = 0
    for one in counts:
        skipped, total = skipped + sum(one.skipped), total + sum(one.total)
    return skipped / total if total else 0.0


def phase_of(rows: int) -> Phase:
    """`"decode"` for one query row, `"prefill"` for anything else."""
    return "decode" if rows == 1 else "prefill"
