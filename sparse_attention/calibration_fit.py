"""From histograms to thresholds: one λ, a curve over the length, or a curve per layer at the least dropped mass.

BLASST (arXiv:2512.12087) and ModelOpt make λ follow the length as `a * exp(b * target) / length`. For one target only
the product c = a * exp(b * target) matters, so c is fitted where it matters, at the target itself, over the lengths
that were collected; `b` is the slope there, so that a target nearby is still met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparse_attention.calibration_balance import balance
from sparse_attention.errors import UsageError
from sparse_attention.gap_histogram import EDGES, GapHistogram
from sparse_attention.threshold import PhaseThreshold

Strategy = Literal["static", "length", "balanced"]
STRATEGIES: tuple[Strategy, ...] = ("static", "length", "balanced")
DEFAULT_STRATEGY: Strategy = "balanced"
"""Over several lengths the only one that meets a target on SmolLM2: how λ has to fall differs from layer to layer."""

MOST = 0.99
"""The largest static λ that is ever fitted; at 1 everything turns dense."""
MOST_OF_CURVE = 0.9
"""The largest λ of a curve at the shortest length it is fitted at: a little shorter, and it would turn dense."""
_STEP = 0.05
"""Half the distance in target over which `b` is taken."""


@dataclass(frozen=True)
class LengthFit:
    """What a fit gives at one length, by the histograms it was fitted to.

    Args:
        threshold: λ, or None where layers differ.
        sparsity: share of tiles skipped.
        mass: mean softmax mass that a row loses.
        most: the largest sparsity any λ below 1 gives at this length.
    """

    threshold: float | None
    sparsity: float
    mass: float
    most: float


@dataclass(frozen=True)
class Fit:
    """Thresholds for one phase: one for all layers, or one each.

    Args:
        layers: by module name, for `balanced`; empty otherwise.
        lengths: what they give at each length, ascending.
    """

    strategy: Strategy
    target: float
    threshold: PhaseThreshold
    layers: dict[str, PhaseThreshold]
    lengths: dict[int, LengthFit]

    def out_of_reach(self, tolerance: float = 0.0) -> dict[int, float]:
        """Lengths at which no λ reaches the target within `tolerance`, with the most that can be had there."""
        return {n: fit.most for n, fit in self.lengths.items() if fit.most < self.target - tolerance}


def fit(
    histogram: GapHistogram, target: float, strategy: Strategy = DEFAULT_STRATEGY, lengths: Sequence[int] | None = None,
    correction: float = 0.0,
) -> Fit:  # fmt: skip
    """Thresholds that skip `target` of the tiles, at all `lengths` as nearly as the strategy can.

    Args:
        histogram: what was collected.
        target: wanted share of skipped tiles, in (0, 1).
        strategy: "static", "length" or "balanced".
        lengths: to fit at; by default all that were collected.
        correction: by how much a sparse run was seen to skip more than the histograms of a dense one say.

    Raises:
        UsageError: for a target outside (0, 1), an unknown strategy, or lengths that were not collected.
    """
    if not 0.0 < target < 1.0:
        raise UsageError(
            "a target sparsity lies between 0 and 1, both excluded",
            where="target",
            found=str(target),
            fix="leave the phase out to keep it dense; no λ below 1 skips every tile",
        )
    if strategy not in STRATEGIES:
        raise UsageError("unknown strategy", found=repr(strategy), fix=f"use one of {', '.join(STRATEGIES)}")
    used = tuple(sorted(lengths)) if lengths else histogram.reached
    curves = {length: histogram.curve(length) for length in used}
    aims = {near: min(max(near - correction, 1e-3), 1 - 1e-3) for near in _around(target)}
    most_lambda = MOST if strategy == "static" else MOST_OF_CURVE
    reachable = tuple(n for n, curve in curves.items() if curve.sparsity(most_lambda) >= aims[target])
    goal = reachable or (max(curves),)  # nowhere: as far as λ goes at the longest
    layers: dict[str, PhaseThreshold] = {}
    if strategy == "balanced":
        per_layer = {name: {n: histogram.curve(n, [name]) for n in curves} for name in histogram.layers}
        scales = {near: balance(per_layer, goal, aim, most_lambda) for near, aim in aims.items()}
        layers = {name: _anchored({near: scales[near][name] for near in aims}, target) for name in histogram.layers}
        # for a layer that the histograms do not know: the middle of the others
        middle = {near: math.exp(float(np.median(np.log(list(found.values()))))) for near, found in scales.items()}
        threshold = _anchored(middle, target)
    elif strategy == "static":
        threshold = PhaseThreshold(
            threshold=_minimax(lambda n, x: curves[n].sparsity(x), goal, aims[target], most_lambda)
        )
    else:
        most = most_lambda * min(goal)
        one = {near: _minimax(lambda n, c: curves[n].sparsity(c / n), goal, aim, most) for near, aim in aims.items()}
        threshold = _anchored(one, target)
    given = {n: _given(histogram, threshold, layers, n, correction) for n in curves}
    return Fit(strategy, target, threshold, layers, given)


def _around(target: float) -> tuple[float, ...]:
    return (max(target - _STEP, target / 2), target, min(target + _STEP, (1 + target) / 2))


def _minimax(sparsity: Callable[[int, float], float], lengths: Sequence[int], target: float, most: float) -> float:
    """The scale in (0, most] whose sparsities lie around the target: the largest is as far above as the least is below.

    Every sparsity grows with the scale, so bisection finds it.
    """
    low, high = math.log(most) + EDGES[0], math.log(most)
    for _ in range(60):
        middle = (low + high) / 2
        found = [sparsity(n, math.exp(middle)) for n in lengths]
        low, high = (low, middle) if max(found) + min(found) >= 2 * target else (middle, high)
    return math.exp(high)


def _anchored(scales: Mapping[float, float], target: float) -> PhaseThreshold:
    """`a` and `b` such that a * exp(b * target) is the scale found there, with the slope of those found nearby."""
    near = sorted(scales)
    b = 0.0
    if len(near) > 1:
        b = (math.log(scales[near[-1]]) - math.log(scales[near[0]])) / (near[-1] - near[0])
    b = max(b, 0.0)  # more sparsity never needs a smaller λ
    return PhaseThreshold(a=scales[target] * math.exp(-b * target), b=b, target=target)


def _given(
    histogram: GapHistogram, threshold: PhaseThreshold, layers: Mapping[str, PhaseThreshold], length: int,
    correction: float,
) -> LengthFit:  # fmt: skip
    """What the thresholds give at one length, by the histograms and the correction."""
    skipped = total = mass = rows = 0.0
    for name in histogram.layers:
        curve = histogram.curve(length, [name])
        value = layers.get(name, threshold).value(length)
        tiles = float(curve.total.sum())
        skipped, total = skipped + curve.sparsity(value) * tiles, total + tiles
        mass, rows = mass + curve.mass_dropped(value) * curve.rows, rows + curve.rows
    most = histogram.curve(length).sparsity(MOST)
    sparsity = min(max(skipped / max(total, 1.0) + correction, 0.0), 1.0)
    return LengthFit(None if layers else threshold.value(length), sparsity, mass / max(rows, 1.0), most)
