"""Counts the gaps of every tile of every layer while a model runs densely."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sparse_attention.calibration_tiles import TileRow, dense_attention
from sparse_attention.errors import ModelError
from sparse_attention.gap_histogram import GapHistogram, LayerGaps
from sparse_attention.layer import AttentionCall, AttentionLayer
from sparse_attention.threshold import Phase

DECODE_ROWS = 64
"""Rows of a prefill that stand for the decode steps at a length, at most."""


def decode_rows(length: int) -> range:
    """Positions whose rows stand for the decode steps at a length: some of its last eighth, and of the last 32.

    Each is one step over the keys before it. Neighbouring rows are alike, so they are spread as far as the length
    (and with it λ) is nearly the same.
    """
    span = min(max(32, length // 8), length)
    return range(length - span, length, max(1, span // DECODE_ROWS))


class _Tiles:
    """The tiles of one call by phase and segment, to be counted together: counting has a price for every call."""

    def __init__(self) -> None:
        self._parts: dict[tuple[Phase, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._rows: Counter[tuple[Phase, int]] = Counter()

    def add(self, phase: Phase, segment: int, gap: Tensor, exists: Tensor, mass: Tensor, rows: int) -> None:
        """Tiles `[Hq, N]` of `rows` (row, head) pairs."""
        self._parts.setdefault((phase, segment), []).append((gap, exists, mass))
        self._rows[phase, segment] += rows

    def together(self) -> Iterator[tuple[tuple[Phase, int], tuple[Tensor, Tensor, Tensor, int]]]:
        """By phase and segment: gap, exists and mass `[Hq, N]` of all its tiles, and how many pairs they are of."""
        for key, parts in self._parts.items():
            gap, exists, mass = (torch.cat(of, dim=-1) for of in zip(*parts, strict=True))
            yield key, (gap, exists, mass, self._rows[key])


class GapCollector:
    """Computes attention in the op's place, densely, and counts what every λ would have skipped.

    Decode is counted from rows before each length of a causal prefill, which are the decode steps there: the same
    query against the same keys, decided alone. Real decode steps (one row) count as such.

    Args:
        lengths: of keys; what lies beyond the last one that a text reaches is not counted.
        units: "head" or "group" for each phase to collect.
    """

    def __init__(self, lengths: Iterable[int], units: Mapping[Phase, str]) -> None:
        self.units = dict(units)
        self._sums: dict[Phase, GapHistogram] = {phase: GapHistogram.empty(lengths) for phase in units}
        self._lengths = next(iter(self._sums.values())).lengths
        self._decode_rows = [decode_rows(length) for length in self._lengths]
        self._first: str | None = None

    def __call__(self, layer: AttentionLayer, call: AttentionCall) -> Tensor:
        """Attention of one call, and its tiles counted; for `sparse_attention.layer.substituted`."""
        self._first = self._first or layer.name
        decode = call.q.shape[2] == 1
        group = call.q.shape[1] // call.k.shape[1]

        found = _Tiles()

        def visit(row: TileRow) -> None:
            if decode:
                self._add_decode(call, row, row.kv_length, found)
                return
            self._add_prefill(call, row, found)
            if call.is_causal:
                self._add_decode(call, row, row.end, found)

        out = dense_attention(call, layer.settings.br, layer.settings.bc, visit)
        if bool(out.isnan().any()):
            raise ModelError(
                "attention gave NaN, so its tiles cannot be judged",
                where=f"{layer.name} ({layer.class_name})",
                found=f"NaN in {call.q.dtype} attention over {call.k.shape[2]} keys",
                fix="look for overflow: load the model with dtype float32 or bfloat16, and check its weights",
            )
        for (phase, segment), (gap, exists, mass, rows) in found.together():
            gaps = self._gaps(phase, layer, call, cumulative=phase == "prefill" and call.is_causal)
            gaps.add(segment, gap, exists, mass, rows, group if self.units[phase] == "group" else 1)
        if layer.name == self._first:
            self._count_sequences(call)
        return out

    @property
    def histograms(self) -> dict[Phase, GapHistogram]:
        """What was counted so far, in main memory."""
        return {
            phase: GapHistogram(
                sums.lengths, sums.sequences.clone(), {name: gaps.to("cpu") for name, gaps in sums.layers.items()}
            )
            for phase, sums in self._sums.items()
        }

    def restore(self, histograms: Mapping[Phase, GapHistogram]) -> None:
        """Goes on from what an earlier run had counted."""
        for phase in self._sums:
            self._sums[phase] = histograms[phase]

    def _add_prefill(self, call: AttentionCall, row: TileRow, found: _Tiles) -> None:
        segment = bisect.bisect_left(self._lengths, row.end if call.is_causal else row.kv_length)
        if "prefill" not in self.units or segment == len(self._lengths):
            return
        if call.is_causal and self._lengths[segment] > row.kv_length:
            return  # the text ends before this segment does
        rows = row.gap.shape[0] * row.gap.shape[1]
        found.add("prefill", segment, row.gap.amax(1), row.exists, row.mass.sum(1), rows)

    def _add_decode(self, call: AttentionCall, row: TileRow, end: int, found: _Tiles) -> None:
        if "decode" not in self.units:
            return
        rows = row.gap.shape[1]
        for segment, length in enumerate(self._lengths):
            first = end - rows
            chosen = [position - first for position in self._decode_rows[segment] if first <= position < end]
            if not chosen or length > row.kv_length:
                continue
            gap, mass = row.gap[:, chosen].flatten(1), row.mass[:, chosen].flatten(1)
            found.add("decode", segment, gap, gap > -torch.inf, mass, gap.shape[0] * len(chosen))

    def _gaps(self, phase: Phase, layer: AttentionLayer, call: AttentionCall, cumulative: bool) -> LayerGaps:
        layers = self._sums[phase].layers
        if layer.name not in layers:
            layers[layer.name] = LayerGaps.empty(len(self._lengths), call.q.shape[1], cumulative, call.q.device)
        gaps = layers[layer.name]
        if gaps.tiles.device != call.q.device:  # what an earlier run had counted comes from a file
            gaps = layers[layer.name] = gaps.to(call.q.device)
        return gaps

    def _count_sequences(self, call: AttentionCall) -> None:
        lengths = [call.k.shape[2]] * call.q.shape[0] if call.kv_lengths is None else call.kv_lengths.tolist()
        for phase, sums in self._sums.items():
            for length in lengths:
                if phase == "prefill" and not call.is_causal:
                    reached: Sequence[int] = [bisect.bisect_left(self._lengths, length)]
                else:
                    reached = range(bisect.bisect_right(self._lengths, length))
                for segment in reached:
                    if segment < len(self._lengths):
                        sums.sequences[segment] += 1
