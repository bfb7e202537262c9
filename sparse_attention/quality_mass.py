"""How much softmax mass skipping drops in every layer, and the bound it cannot exceed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attention.calibration_tiles import TileRow, dense_attention
from sparse_attention.layer import AttentionCall, AttentionLayer
from sparse_attention.reference import effective_threshold
from sparse_attention.statistics import TileCounts


@dataclass
class LayerMass:
    """Softmax mass dropped in one layer, over (row, head) pairs; sums unless said otherwise.

    Args:
        rows: pairs.
        mass: mass of the dense softmax that skipped tiles held.
        bound: `n * λ / (1 + n * λ)`, n the skipped columns of the row: the mass is never more.
        worst, worst_bound: the largest of each.
        violations: pairs whose mass exceeds the bound by more than rounding: always 0 if all is well.
        skipped, total: tiles, per query head.
    """

    rows: int = 0
    mass: float = 0.0
    bound: float = 0.0
    worst: float = 0.0
    worst_bound: float = 0.0
    violations: int = 0
    skipped: list[int] | None = None
    total: list[int] | None = None


class MassObserver:
    """Watches a sparse run (`sparse_attention.observed`) and judges what each layer left out, on its own q, k and v."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerMass] = {}

    def __call__(self, layer: AttentionLayer, call: AttentionCall, out: Tensor, counts: Tensor) -> None:
        """One call; see `sparse_attention.layer.Observer`."""
        found = self.layers.setdefault(layer.name, LayerMass())
        given = TileCounts.of(counts)
        found.skipped = _added(found.skipped, given.skipped)
        found.total = _added(found.total, given.total)
        lam = _threshold(layer, call)
        group = call.q.shape[1] // call.k.shape[1] if layer.unit == "group" else 1

        def visit(row: TileRow) -> None:
            skipped = skipped_tiles(row, lam[row.batch], group)
            mass = (row.mass * skipped.unsqueeze(1)).sum(-1)
            columns = (row.columns.to(skipped.device) * skipped).sum(-1).double() * lam[row.batch]
            bound = (columns / (1 + columns)).unsqueeze(-1).expand_as(mass)
            found.rows += mass.numel()
            found.mass += float(mass.double().sum())
            found.bound += float(bound.sum())
            found.worst = max(found.worst, float(mass.max()))
            found.worst_bound = max(found.worst_bound, float(bound.max()))
            found.violations += int((mass > bound + 1e-5).sum())

        if any(lam):
            dense_attention(call, layer.settings.br, layer.settings.bc, visit)


class TileMapObserver:
    """Keeps which tiles of one layer were skipped: `tiles [Hq, R, C]`, 0 absent, 1 kept, 2 skipped (first sequence)."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.tiles: Tensor | None = None

    def __call__(self, layer: AttentionLayer, call: AttentionCall, out: Tensor, counts: Tensor) -> None:
        """One call; see `sparse_attention.layer.Observer`."""
        if layer.name != self.layer or call.q.shape[2] == 1:
            return
        lam = _threshold(layer, call)
        br, bc = layer.settings.br, layer.settings.bc
        group = call.q.shape[1] // call.k.shape[1] if layer.unit == "group" else 1
        tiles = torch.zeros(
            call.q.shape[1], math.ceil(call.q.shape[2] / br), math.ceil(call.k.shape[2] / bc), dtype=torch.uint8
        )

        def visit(row: TileRow) -> None:
            if row.batch:
                return
            state = row.exists.to(torch.uint8) + skipped_tiles(row, lam[0], group).to(torch.uint8)
            tiles[:, row.first // br, : state.shape[-1]] = state.cpu()

        dense_attention(call, br, bc, visit)
        self.tiles = tiles


def skipped_tiles(row: TileRow, threshold: float, group: int = 1) -> Tensor:
    """Which tiles of a row the rule skips at λ = `threshold`: `[H, C] bool`; `group` heads decide together."""
    gap = row.gap.amax(1)
    if group > 1:
        gap = gap.unflatten(0, (-1, group)).amax(1).repeat_interleave(group, 0)
    return row.exists & (gap < (math.log(threshold) if threshold > 0 else -math.inf))


def _threshold(layer: AttentionLayer, call: AttentionCall) -> list[float]:
    batch, columns = call.k.shape[0], call.k.shape[2]
    lengths = torch.full((batch,), columns) if call.kv_lengths is None else call.kv_lengths.cpu()
    scale = None if layer.threshold_scale is None else layer.threshold_scale.cpu()
    values: list[float] = effective_threshold(layer.thresholds.phase(call.q.shape[2]), lengths, scale).tolist()
    return values


def _added(before: list[int] | None, more: tuple[int, ...]) -> list[int]:
    return list(more) if before is None else [a + b for a, b in zip(before, more, strict=True)]
