"""Per-layer thresholds that skip a wanted share of all tiles at the least dropped softmax mass.

Each layer picks one scale c (λ = c / length). The mass a row loses bounds its error (rule: at most 2 * max|v| * mass),
so it says without labels which layer can spare tiles cheaply. One multiplier a length prices its sparsity; at given
prices every layer's best scale is independent, and the prices are raised or lowered until the lengths agree. Because
sparsity at fixed c still grows with the length, and differently from layer to layer, the choice also levels lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sparse_attention.gap_histogram import EDGES, SkipCurve

Array = NDArray[np.float64]

LEVEL = 0.02
"""How far from the target a length may lie, where there are several, before it costs anything."""
_EXACT = 0.002
_OPTIONS_PER_UNIT = 32
_WEIGHTS = (1.0, 10.0, 100.0, 1e3, 1e4)
"""Of the penalty on lengths that miss the target, rising."""
_STEPS = 1000


def balance(
    layers: Mapping[str, Mapping[int, SkipCurve]], lengths: Sequence[int], target: float, most: float
) -> dict[str, float]:
    """The scale c of each layer, λ = c / length, in (0, most * shortest length].

    Args:
        layers: what each λ skips, by module name and length.
        lengths: at which the target is wanted; those where it can be reached.
        target: wanted share of all tiles, in (0, 1).
        most: the largest λ allowed.
    """
    scales = _scales(min(lengths), most)
    sparsity, mass = _tables(layers, lengths, scales)
    level = LEVEL if len(lengths) > 1 else _EXACT
    # one scale for all is a start too, so that the result is never worse than that
    starts = (_at_best_prices(sparsity, mass, target), _one_for_all(sparsity, target))
    settled = [_settled(start, sparsity, mass, target, level) for start in starts]
    choice = min(settled, key=lambda choice: _cost(choice, sparsity, mass, target, level))
    return {name: float(scales[option]) for name, option in zip(layers, choice, strict=True)}


def _scales(shortest: int, most: float) -> Array:
    """Candidates of c, ascending; the smallest skips nothing that a histogram can tell."""
    top = math.log(most * shortest)
    bottom = math.log(shortest) + EDGES[0]
    return np.exp(np.linspace(top, bottom, math.ceil((top - bottom) * _OPTIONS_PER_UNIT))[::-1])


def _tables(
    layers: Mapping[str, Mapping[int, SkipCurve]], lengths: Sequence[int], scales: Array
) -> tuple[Array, Array]:
    """Each layer's share of all skipped tiles `[layers, options, lengths]` and of the mean mass `[layers, options]`."""
    sparsity = np.zeros((len(layers), len(scales), len(lengths)))
    mass = np.zeros((len(layers), len(scales)))
    for column, length in enumerate(lengths):
        total = sum(float(curves[length].total.sum()) for curves in layers.values())
        rows = sum(curves[length].rows for curves in layers.values())
        logs = np.log(scales / length)
        for row, curves in enumerate(layers.values()):
            curve = curves[length]
            share = float(curve.total.sum()) / max(total, 1.0)
            sparsity[row, :, column] = np.interp(logs, EDGES, curve.sparsities) * share
            mass[row] += np.interp(logs, EDGES, curve.mass) / max(rows, 1.0) / len(lengths)
    return sparsity, mass


def _at_best_prices(sparsity: Array, mass: Array, target: float) -> NDArray[np.intp]:
    """Every layer's best option at the prices that bring the lengths nearest to the target (dual ascent)."""
    price = np.full(sparsity.shape[2], 1e-2)
    best, least = np.zeros(len(mass), dtype=np.intp), math.inf
    for step in range(_STEPS):
        choice = np.argmin(mass - sparsity @ price, axis=1)
        missing = target - _sum(sparsity, choice)
        worst = float(np.abs(missing).max())
        if worst < least:
            best, least = choice, worst
        price = price + missing * (0.5 / (1.0 + 0.3 * step))
    return best


def _settled(choice: NDArray[np.intp], sparsity: Array, mass: Array, target: float, level: float) -> NDArray[np.intp]:
    """The choice improved layer by layer, with a growing penalty on lengths that miss the target."""
    choice = choice.copy()
    rows = np.arange(len(mass))
    for weight in _WEIGHTS:
        for _ in range(50):
            before = choice.copy()
            for layer in rows:
                others = _sum(sparsity, choice) - sparsity[layer, choice[layer]]
                off = np.maximum(np.abs(others + sparsity[layer] - target) - level, 0.0)
                choice[layer] = int(np.argmin(mass[layer] + weight * (off**2).sum(axis=1)))
            if np.array_equal(before, choice):
                break
    return choice


def _one_for_all(sparsity: Array, target: float) -> NDArray[np.intp]:
    """The same option for every layer, the one whose lengths lie nearest to the target."""
    worst = np.abs(sparsity.sum(axis=0) - target).max(axis=1)
    return np.full(len(sparsity), int(np.argmin(worst)), dtype=np.intp)


def _cost(choice: NDArray[np.intp], sparsity: Array, mass: Array, target: float, level: float) -> float:
    off = np.maximum(np.abs(_sum(sparsity, choice) - target) - level, 0.0)
    return float(mass[np.arange(len(mass)), choice].sum() + _WEIGHTS[-1] * (off**2).sum())


def _sum(sparsity: Array, choice: NDArray[np.intp]) -> Array:
    result: Array = sparsity[np.arange(len(choice)), choice].sum(axis=0)
    return result
