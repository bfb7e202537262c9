"""How many tiles each λ would skip, and how much softmax mass they hold: histograms over the tiles' gaps.

A tile is skipped where its gap is below ln λ, so the counts up to a bin's edge say exactly what that λ skips: no trial
runs. All sums are integers (mass in fixed point), so histograms of shards add up exactly, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_attention.errors import UsageError

LOWEST = -24.0
PER_UNIT = 32
"""Edges over ln λ: from λ = 4e-11 up to 1, each 3 % above the one before."""
EDGES: NDArray[np.float64] = LOWEST + np.arange(int(-LOWEST) * PER_UNIT + 1) / PER_UNIT
BINS = len(EDGES) + 1
"""One bin below the lowest edge, one between each two, and one for gaps of 0, which no λ skips."""
MASS_UNIT = 2.0**-32
"""Mass is summed in these units of one row's softmax."""


def bins_of(gap: Tensor) -> Tensor:
    """The bin of each gap, int64: how many edges lie at or below it; the bins up to i hold what is below edge i.

    NaN is kept like 0: no λ skips it.
    """
    position = torch.floor((gap.double() - LOWEST) * PER_UNIT) + 1
    return position.clamp(0, BINS - 1).nan_to_num(BINS - 1).to(torch.int64)


@dataclass
class LayerGaps:
    """Histograms of one attention module, by segment of the sequence.

    Args:
        tiles: existing tiles by gap, `[S, Hq, BINS] int64`.
        mass: softmax mass of those tiles, all heads together, `[S, BINS] int64` in `MASS_UNIT`.
        rows: (query row, head) pairs that vote, `[S] int64`.
        cumulative: whether a length holds all segments up to its own (causal prefill) or only its own.
    """

    tiles: Tensor
    mass: Tensor
    rows: Tensor
    cumulative: bool

    @classmethod
    def empty(cls, segments: int, heads: int, cumulative: bool, device: torch.device | str = "cpu") -> LayerGaps:
        """Nothing counted yet."""
        tiles, mass, rows = (
            torch.zeros(shape, dtype=torch.int64, device=device)
            for shape in ((segments, heads, BINS), (segments, BINS), (segments,))
        )
        return cls(tiles, mass, rows, cumulative)

    def add(self, segment: int, gap: Tensor, exists: Tensor, mass: Tensor, rows: int, group: int = 1) -> None:
        """Counts tiles `[Hq, N]` of `rows` voting (row, head) pairs.

        `gap` is the maximum over the rows of a tile, `mass` their sum. With `group > 1` so many neighbouring heads
        decide together.
        """
        if group > 1:
            joint = gap.unflatten(0, (-1, group)).amax(1, keepdim=True)
            gap = joint.expand(-1, group, -1).flatten(0, 1)
        index = bins_of(gap)
        units = torch.round(mass.double() / MASS_UNIT).to(torch.int64) * exists
        self.mass[segment].scatter_add_(0, index.flatten(), units.flatten())
        self.tiles[segment].scatter_add_(1, index, exists.to(torch.int64))
        self.rows[segment] += rows

    def to(self, device: torch.device | str) -> LayerGaps:
        """The same counts on a device."""
        return LayerGaps(self.tiles.to(device), self.mass.to(device), self.rows.to(device), self.cumulative)

    def __iadd__(self, other: LayerGaps) -> LayerGaps:
        self.tiles += other.tiles.to(self.tiles.device)
        self.mass += other.mass.to(self.mass.device)
        self.rows += other.rows.to(self.rows.device)
        return self


@dataclass
class GapHistogram:
    """What calibration has collected in one phase: layers by module name, over given lengths.

    A causal prefill of 8k tokens holds the prefills of 2k and 4k tokens, so segment i holds the rows between
    `lengths[i - 1]` and `lengths[i]`. In decode, and where attention is not causal, a segment is one length.

    Args:
        lengths: keys, ascending; one segment each.
        sequences: how many sequences reached each length.
    """

    lengths: tuple[int, ...]
    sequences: Tensor
    layers: dict[str, LayerGaps] = field(default_factory=dict)

    @classmethod
    def empty(cls, lengths: Iterable[int]) -> GapHistogram:
        """No layer and nothing counted yet."""
        lengths = tuple(sorted(set(lengths)))
        return cls(lengths, torch.zeros(len(lengths), dtype=torch.int64))

    def merge(self, other: GapHistogram) -> GapHistogram:
        """Both together; exact, and the order does not matter.

        Raises:
            UsageError: where the two were not collected in the same way.
        """
        ours, theirs = self._shape(), other._shape()
        if self.layers and other.layers and ours != theirs:
            raise UsageError(
                "histograms of different runs cannot be added",
                where="calibration shards",
                found=f"lengths {self.lengths} and {other.lengths}, {len(ours)} and {len(theirs)} layers",
                fix="collect every shard with the same model, tiles, lengths and unit",
            )
        result = GapHistogram(self.lengths, self.sequences + other.sequences)
        for name in self.layers or other.layers:
            given = [side.layers[name] for side in (self, other) if name in side.layers]
            first = given[0]
            total = LayerGaps(first.tiles.clone(), first.mass.clone(), first.rows.clone(), first.cumulative)
            for more in given[1:]:
                total += more
            result.layers[name] = total
        return result

    def _shape(self) -> list[object]:
        return [self.lengths, *((name, tuple(gaps.tiles.shape), gaps.cumulative) for name, gaps in self.layers.items())]

    @property
    def reached(self) -> tuple[int, ...]:
        """The lengths that some sequence reached."""
        return tuple(length for length, count in zip(self.lengths, self.sequences.tolist(), strict=True) if count)

    def curve(self, length: int, layers: Iterable[str] | None = None) -> SkipCurve:
        """What each λ skips at `length`, over the given layers together (all of them by default).

        Raises:
            UsageError: where no sequence reached that length.
        """
        if length not in self.reached:
            raise UsageError(
                "nothing was collected at this length",
                where=f"length {length}",
                found=f"collected: {', '.join(map(str, self.reached)) or 'nothing'}",
                fix="calibrate on texts that are long enough, or leave the length out",
            )
        names = list(self.layers) if layers is None else list(layers)
        return sum((self._layer_curve(name, length) for name in names[1:]), self._layer_curve(names[0], length))

    def _layer_curve(self, name: str, length: int) -> SkipCurve:
        last = self.lengths.index(length)
        gaps = self.layers[name]
        tiles, mass, rows = np.zeros(gaps.tiles.shape[1:]), np.zeros(BINS), 0.0
        for segment in range(0 if gaps.cumulative else last, last + 1):
            count = int(self.sequences[segment])  # shorter texts do not weigh more than longer ones
            tiles += gaps.tiles[segment].numpy() / count
            mass += gaps.mass[segment].numpy() * (MASS_UNIT / count)
            rows += int(gaps.rows[segment]) / count
        return SkipCurve(_below(tiles), np.sum(tiles, axis=-1), _below(mass), rows)


def _below(histogram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums below every edge, `[..., BINS - 1]`."""
    below: NDArray[np.float64] = np.cumsum(histogram, axis=-1)[..., :-1]
    return below


@dataclass(frozen=True)
class SkipCurve:
    """Tiles skipped and mass dropped at every edge over ln λ, at one length; per sequence on average.

    Args:
        skipped: tiles below each edge, `[H, len(EDGES)]`.
        total: existing tiles, `[H]`.
        mass: softmax mass below each edge, summed over rows and heads, `[len(EDGES)]`.
        rows: (row, head) pairs.
    """

    skipped: NDArray[np.float64]
    total: NDArray[np.float64]
    mass: NDArray[np.float64]
    rows: float

    def __add__(self, other: SkipCurve) -> SkipCurve:
        skipped, total = self.skipped.sum(0, keepdims=True), self.total.sum(keepdims=True)
        return SkipCurve(
            skipped + other.skipped.sum(0), total + other.total.sum(), self.mass + other.mass, self.rows + other.rows
        )

    @property
    def sparsities(self) -> NDArray[np.float64]:
        """Sparsity at every edge, ascending, `[len(EDGES)]`."""
        result: NDArray[np.float64] = self.skipped.sum(0) / max(float(self.total.sum()), 1.0)
        return result

    @property
    def dropped(self) -> NDArray[np.float64]:
        """Mean softmax mass that a row loses, at every edge, `[len(EDGES)]`."""
        result: NDArray[np.float64] = self.mass / max(self.rows, 1.0)
        return result

    def sparsity(self, threshold: float) -> float:
        """Share of tiles skipped at λ = `threshold`; 0 where that is 0 or not below 1 (dense)."""
        return _at(self.sparsities, threshold)

    def mass_dropped(self, threshold: float) -> float:
        """Mean softmax mass a row loses at λ = `threshold`."""
        return _at(self.dropped, threshold)

    def per_head(self, threshold: float) -> list[float]:
        """Sparsity of each query head at λ = `threshold`."""
        return [
            _at(skipped / max(total, 1.0), threshold) for skipped, total in zip(self.skipped, self.total, strict=True)
        ]


def _at(values: NDArray[np.float64], threshold: float) -> float:
    if not 0.0 < threshold < 1.0:
        return 0.0
    return float(np.interp(math.log(threshold), EDGES, values))


def merged(histograms: Iterable[Mapping[str, GapHistogram]]) -> dict[str, GapHistogram]:
    """Phase by phase, the sum of what several processes collected.

    Raises:
        UsageError: where there is nothing, or the parts were not collected in the same way.
    """
    total: dict[str, GapHistogram] = {}
    for part in histograms:
        for phase, histogram in part.items():
            total[phase] = total[phase].merge(histogram) if phase in total else histogram
    if not total:
        raise UsageError("no histogram to add", where="calibration shards", fix="collect at least one shard")
    return total
