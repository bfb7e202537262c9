"""`calibrate(model, config, batches)`: thresholds for a wanted sparsity, from one dense pass over some text.

Every tile's gap is collected once, so what each λ skips is known without trials (`gap_histogram`); a strategy turns
that into thresholds (`calibration_fit`); true sparse runs on other text say what they achieve (`calibration_check`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sparse_attention.calibration_check import Achieved, achieved_sparsity
from sparse_attention.calibration_collect import Progress, collect
from sparse_attention.calibration_fit import DEFAULT_STRATEGY, Fit, LengthFit, Strategy, fit
from sparse_attention.config import CalibrationConfig, SparseAttentionConfig
from sparse_attention.config_io import Source, load_config
from sparse_attention.errors import ConfigError, UsageError
from sparse_attention.gap_histogram import GapHistogram
from sparse_attention.threshold import PHASES, Phase, PhaseThreshold
from sparse_attention.trial import Batch


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    Args:
        config: what `sparsify` and the export take; the results are in its calibrating pattern.
        fits: thresholds by phase, and what they give on the calibration text.
        achieved: what they give on held-out text, by phase and length; empty without such text.
        histograms: what was collected.
    """

    config: SparseAttentionConfig
    fits: dict[Phase, Fit]
    achieved: dict[Phase, dict[int, Achieved]]
    histograms: dict[Phase, GapHistogram] = field(repr=False)

    def missed(self, tolerance: float = 0.03) -> list[str]:
        """Each length at which the target is out of reach, or missed, as a sentence.

        Missed on held-out text, or on the calibration text where there is no other.
        """
        lines = []
        for phase, found in self.fits.items():
            for length, given in found.lengths.items():
                got = self.achieved.get(phase, {}).get(length)
                where = f"{phase} at {length} tokens"
                if given.most < found.target - tolerance:
                    lines.append(
                        f"{where}: {found.target:.2f} is out of reach; the most that can be had is {given.most:.2f}"
                    )
                    continue
                sparsity, text = (given.sparsity, "calibration") if got is None else (got.sparsity, "held-out")
                if abs(sparsity - found.target) > tolerance:
                    lines.append(
                        f"{where}: {sparsity:.3f} of the tiles of {text} text are skipped instead of {found.target:.2f}"
                    )
        return lines


def calibrate(
    model: nn.Module,
    config: SparseAttentionConfig | Source,
    batches: Iterable[Batch] = (),
    *,
    targets: Mapping[Phase, float] | None = None,
    strategy: Strategy | None = None,
    lengths: Sequence[int] | None = None,
    held_out: Iterable[Batch] = (),
    unit: str = "head",
    decode_unit: str = "group",
    histograms: Mapping[Phase, GapHistogram] | None = None,
    refine: int = 0,
    state: Path | str | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Finds the thresholds that skip a wanted share of the tiles. The model is left as it was given.

    Args:
        model: in eval mode, sparsified or not; larger models may be spread with `device_map`.
        config: whose calibrating pattern (or only pattern) selects the layers; its `calibration` may give the targets.
        batches: texts, as token ids `[B, S]` or as keyword arguments of the model; the longer, the better.
        targets: wanted share of skipped tiles in (0, 1), by phase; a phase at 0 or left out is not calibrated.
        strategy: "static" (one λ), "length" (λ follows the length) or "balanced" (a curve per layer, at the least
            dropped softmax mass); by default the configuration's, or else "balanced".
        lengths: of keys, at which to meet the target with one configuration; by default those of the texts.
        held_out: other texts on which to measure what is achieved, in true sparse runs.
        unit, decode_unit: "head" or "group", as the kernel decides in prefill and in decode.
        histograms: collected before, for instance by several processes; then `batches` are not run.
        refine: how many times to correct the fit by a sparse run on the first text, because what a layer skips changes
            the input of the next ones.
        state: a file in which the run keeps its place; a run that was cut off goes on from there.
        progress: is told what is being done.

    Raises:
        UsageError: too little text, texts shorter than a tile, or a target outside (0, 1).
        ConfigError: where the configuration does not say what to calibrate.
        ModelError: on NaN in attention, on tokens the model does not know, or a model without such attention.
    """
    config = load_config(config)
    request = _request(config, targets, strategy)
    chosen = request.strategy or DEFAULT_STRATEGY
    wanted = {phase: getattr(request, phase).target for phase in PHASES if getattr(request, phase) is not None}
    batches, held_out = list(batches), list(held_out)
    units: dict[Phase, str] = {phase: decode_unit if phase == "decode" else unit for phase in wanted}
    if histograms is None:
        collected = collect(model, config, batches, lengths=lengths, units=units, state=state, progress=progress)
    else:
        collected = {phase: histograms[phase] for phase in wanted if phase in histograms}
    if not collected:
        raise UsageError("nothing was collected for these phases", where=", ".join(wanted), fix="collect them first")
    corrections = dict.fromkeys(collected, 0.0)
    fits = _fits(collected, wanted, chosen, lengths, corrections)
    samples = len(batches) or max((int(h.sequences.max()) for h in collected.values()), default=0)

    def configured(
        found: Mapping[Phase, Fit], achieved: Mapping[Phase, Mapping[int, Achieved]]
    ) -> SparseAttentionConfig:
        return config.calibrated(_result(found, collected, units, achieved, samples))

    for _ in range(refine):
        got = achieved_sparsity(model, configured(fits, {}), batches[:1], _used(fits), units, progress)
        corrections = {phase: corrections[phase] + _off(found, got.get(phase, {})) for phase, found in fits.items()}
        fits = _fits(collected, wanted, chosen, lengths, corrections)
    achieved = achieved_sparsity(model, configured(fits, {}), held_out, _used(fits), units, progress)
    return Calibration(configured(fits, achieved), fits, achieved, collected)


def _request(
    config: SparseAttentionConfig, targets: Mapping[Phase, float] | None, strategy: Strategy | None
) -> CalibrationConfig:
    carried = config.calibration[1] if config.calibration else None
    if targets is None:
        if carried is None:
            raise ConfigError(
                "no target sparsity is given",
                where="calibration",
                fix="pass targets, or put calibration: {prefill: {target: 0.5}} into the configuration",
            )
        targets = {phase: getattr(carried, phase).target for phase in PHASES if getattr(carried, phase) is not None}
    for phase, target in targets.items():
        if phase not in PHASES:
            raise UsageError("unknown phase", where="targets", found=repr(phase), fix=f"use {' or '.join(PHASES)}")
        if not 0.0 <= target < 1.0:
            raise UsageError(
                "a target sparsity lies between 0 and 1, both excluded",
                where=f"target {phase}",
                found=str(target),
                fix="no λ below 1 skips every tile; 0 leaves the phase dense",
            )
    given: dict[str, Any] = {phase: {"target": float(target)} for phase, target in targets.items() if target > 0}
    if not given:
        raise UsageError(
            "every target is 0, so nothing is to be calibrated",
            where="targets",
            fix="ask for a share of tiles between 0 and 1, or use the preset dense",
        )
    chosen = strategy or (carried.strategy if carried is not None else None)
    return CalibrationConfig.model_validate({"strategy": chosen, **given})


def _fits(
    collected: Mapping[Phase, GapHistogram], wanted: Mapping[Phase, float], strategy: Strategy,
    lengths: Sequence[int] | None, corrections: Mapping[Phase, float],
) -> dict[Phase, Fit]:  # fmt: skip
    return {
        phase: fit(histogram, wanted[phase], strategy, lengths or _matter(phase, histogram), corrections[phase])
        for phase, histogram in collected.items()
    }


def _matter(phase: Phase, histogram: GapHistogram) -> tuple[int, ...]:
    """The lengths to meet the target at where nobody said: those at which texts end, down to a quarter of the longest.

    What a text shows on its way counts only where it is asked for: one curve for several lengths meets none exactly.
    """
    counts = histogram.sequences.tolist()
    holds_shorter = phase == "decode" or any(gaps.cumulative for gaps in histogram.layers.values())
    ends = [n - (more if holds_shorter else 0) for n, more in zip(counts, [*counts[1:], 0], strict=True)]
    found = [length for length, texts in zip(histogram.lengths, ends, strict=True) if texts > 0]
    return tuple(length for length in found if 4 * length >= found[-1])


def _off(found: Fit, got: Mapping[int, Achieved]) -> float:
    """By how much a sparse run skips more than the histograms of the dense one say, over the lengths together."""
    unreachable = found.out_of_reach()
    off = [got[n].sparsity - given.sparsity for n, given in found.lengths.items() if n in got and n not in unreachable]
    return sum(off) / len(off) if off else 0.0


def _result(
    fits: Mapping[Phase, Fit], collected: Mapping[Phase, GapHistogram], units: Mapping[Phase, str],
    achieved: Mapping[Phase, Mapping[int, Achieved]], samples: int,
) -> CalibrationConfig:  # fmt: skip
    """The fits as the configuration keeps them: thresholds, and beside them what was observed."""
    first = next(iter(fits.values()))
    given: dict[str, Any] = {"strategy": first.strategy, "max_seqlen": max(max(h.reached) for h in collected.values())}
    if samples:
        given["samples"] = samples
    layers: dict[str, dict[str, Any]] = {}
    for phase, found in fits.items():
        got = achieved.get(phase, {})
        given[phase] = {
            "target": found.target,
            **_numbers(found.threshold),
            "observed": {
                "unit": units[phase],
                "lengths": {str(n): _observed(one, got.get(n)) for n, one in found.lengths.items()},
                "out_of_reach": {str(n): round(most, 4) for n, most in found.out_of_reach().items()},
            },
        }
        for name, threshold in found.layers.items():
            layers.setdefault(name, {})[phase] = {"target": found.target, **_numbers(threshold)}
    if layers:
        given["layers"] = layers
    return CalibrationConfig.model_validate(given)


def _numbers(threshold: PhaseThreshold) -> dict[str, float]:
    return {"a": threshold.a, "b": threshold.b} if threshold.a else {"threshold": threshold.threshold}


def _observed(given: LengthFit, got: Achieved | None) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "sparsity": round(given.sparsity, 4), "dropped_mass": float(f"{given.mass:.4g}"), "most": round(given.most, 4)
    }  # fmt: skip
    if given.threshold is not None:
        numbers["threshold"] = float(f"{given.threshold:.6g}")
    if got is not None:
        numbers["held_out"] = round(got.sparsity, 4)
    return numbers


def _used(fits: Mapping[Phase, Fit]) -> dict[Phase, tuple[int, ...]]:
    return {phase: tuple(found.lengths) for phase, found in fits.items()}
