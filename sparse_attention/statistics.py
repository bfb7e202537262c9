"""Tile counts: how many tiles exist and how many were skipped, per layer, head and phase."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


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
        total = sum(self.total)
        return sum(self.skipped) / total if total else 0.0

    def __add__(self, other: TileCounts) -> TileCounts:
        """Counts of both; the number of heads must agree."""
        pairs = zip(self.skipped, other.skipped, strict=True), zip(self.total, other.total, strict=True)
        return TileCounts(tuple(a + b for a, b in pairs[0]), tuple(a + b for a, b in pairs[1]))


@dataclass
class LayerStatistics:
    """What one attention module has counted so far, by phase (`"prefill"`, `"decode"`)."""

    by_phase: dict[str, TileCounts] = field(default_factory=dict)

    def add(self, phase: str, counts: TileCounts) -> None:
        """Adds the counts of one call."""
        known = self.by_phase.get(phase)
        self.by_phase[phase] = counts if known is None else known + counts

    def reset(self) -> None:
        """Forgets everything counted so far."""
        self.by_phase.clear()


def total_sparsity(counts: Iterable[TileCounts]) -> float:
    """Sparsity over all given counts together: skipped tiles over existing tiles, in [0, 1]."""
    skipped = total = 0
    for one in counts:
        skipped, total = skipped + sum(one.skipped), total + sum(one.total)
    return skipped / total if total else 0.0


def phase_of(rows: int | torch.SymInt) -> str:
    """`"decode"` for one query row, `"prefill"` for anything else."""
    return "decode" if rows == 1 else "prefill"
