"""Comparing computations of one attention call: tile decisions within the rounding band, outputs on the same tiles."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from export.runners import NodeRunner
from export.tolerances import GAP_BAND, OUTPUT
from sparse_attention import reference
from sparse_attention.layer import AttentionCall, AttentionLayer
from sparse_attention.statistics import phase_of


@dataclass(frozen=True)
class BandTile:
    """A tile that was decided differently, and allowed to be: its gap lies within the rounding band of ln λ."""

    batch: int
    head: int
    row: int
    column: int
    gap: float
    log_threshold: float


@dataclass(frozen=True)
class LayerResult:
    """One attention layer on its own q, k, v: the exported node against the reference.

    `error` is the largest difference of the outputs over max|v|, `gap_error` that of the tile gaps; `threshold` is λ as
    the call used it (the batch's largest). `different` counts the tiles decided differently outside the band.
    """

    name: str
    phase: str
    threshold: float
    tiles: int
    skipped: int
    error: float
    tolerance: float
    gap_error: float
    different: int
    in_band: tuple[BandTile, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Decisions agree outside the band, and outputs on the same tiles agree within the dtype's tolerance."""
        return self.different == 0 and self.error <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self) | {"passed": self.passed}


def compare_layer(layer: AttentionLayer, call: AttentionCall, out: Tensor, node: NodeRunner) -> LayerResult:
    """Runs `node` on what the PyTorch layer was given and compares it, and PyTorch's `out`, with the reference.

    The reference computes its output on the node's decisions, so that a tile in the band does not count as an error.
    """
    given = {name: getattr(call, name) for name in
             ("q", "k", "v", "bias", "kv_lengths", "q_start", "q_lengths", "sinks")}  # fmt: skip
    given["threshold_scale"] = layer.threshold_scale
    got = node(given)
    options: dict[str, Any] = {name: value for name, value in given.items() if name not in ("q", "k", "v")}
    options |= {
        "threshold": layer.thresholds, "br": layer.settings.br, "bc": layer.settings.bc, "is_causal": call.is_causal,
        "scale": call.scale, "softcap": call.softcap, "window": call.window, "unit": layer.unit,
    }  # fmt: skip
    dtype = str(call.q.dtype).removeprefix("torch.")
    expected, tiles = reference.attention(call.q, call.k, call.v, **options)
    log_threshold = torch.log(_threshold(layer, call)).view(-1, 1, 1, 1).expand_as(tiles.gap)
    near = (tiles.gap - log_threshold).abs() <= GAP_BAND[dtype]
    differs = (tiles.kept != got["tile_kept"]) | (tiles.exists != got["tile_exists"])
    if bool((differs & near).any()):
        expected, _ = reference.attention(call.q, call.k, call.v, kept=got["tile_kept"], **options)
    scale = float(call.v.float().abs().max().clamp(min=1e-30))
    errors = [(got["o"].float() - expected).abs().max()]
    if not bool(differs.any()):
        errors.append((out.float().cpu() - expected).abs().max())
    finite = torch.isfinite(tiles.gap) & torch.isfinite(got["tile_gap"])
    return LayerResult(
        name=layer.name,
        phase=phase_of(call.q.shape[2]),
        threshold=float(_threshold(layer, call).max()),
        tiles=int(got["tile_exists"].sum()),
        skipped=int((got["tile_exists"] & ~got["tile_kept"]).sum()),
        error=float(torch.stack(errors).max()) / scale,
        tolerance=OUTPUT[dtype],
        gap_error=float((tiles.gap - got["tile_gap"])[finite].abs().max()) if bool(finite.any()) else 0.0,
        different=int((differs & ~near).sum()),
        in_band=tuple(
            BandTile(b, h, r, c, gap=float(tiles.gap[b, h, r, c]), log_threshold=float(log_threshold[b, h, r, c]))
            for b, h, r, c in (differs & near).nonzero().tolist()
        ),
    )


def _threshold(layer: AttentionLayer, call: AttentionCall) -> Tensor:
    """λ of the call per batch element, `[B] float32`."""
    batch, columns = call.q.shape[0], call.k.shape[2]
    lengths = torch.full((batch,), columns) if call.kv_lengths is None else call.kv_lengths
    return reference.effective_threshold(layer.thresholds.phase(call.q.shape[2]), lengths, layer.threshold_scale)
