"""Strategies: what each one promises, on histograms whose answer is known or computed here by brute force."""

import math

import numpy as np
import pytest
import torch
from calibration_models import CONFIG, peaky_llama, random_texts

from sparse_attention.calibration_collect import collect, default_lengths
from sparse_attention.calibration_fit import STRATEGIES, fit
from sparse_attention.errors import UsageError
from sparse_attention.gap_histogram import BINS, EDGES, GapHistogram, LayerGaps


def uniform_layer(lowest, *, tiles=4000, mass=1e-4, lengths=1, shift=0.0):
    """Gaps spread evenly over [lowest + shift * ln length, 0]; each tile holds exp(gap) * `mass`."""
    shape = torch.zeros(lengths, 1, BINS, dtype=torch.int64)
    masses = torch.zeros(lengths, BINS, dtype=torch.int64)
    for segment in range(lengths):
        gaps = torch.linspace(lowest + shift * math.log(2) * segment, 0, tiles, dtype=torch.float64)
        bins = torch.floor((gaps - EDGES[0]) * 32).to(torch.int64) + 1
        shape[segment, 0].scatter_add_(0, bins.clamp(0, BINS - 1), torch.ones_like(bins))
        units = (gaps.exp() * mass * 2**32).to(torch.int64)
        masses[segment].scatter_add_(0, bins.clamp(0, BINS - 1), units)
    return LayerGaps(shape, masses, torch.full((lengths,), 1000), cumulative=False)


def histogram(layers, lengths=(1024,)):
    return GapHistogram(tuple(lengths), torch.ones(len(lengths), dtype=torch.int64), layers)


def test_static_finds_the_threshold():
    found = fit(histogram({"a": uniform_layer(-10.0)}), 0.3, "static")
    assert found.threshold.threshold == pytest.approx(math.exp(-7.0), rel=0.02)
    assert found.lengths[1024].sparsity == pytest.approx(0.3, abs=1e-3)


def test_length_finds_the_curve_and_its_slope():
    found = fit(histogram({"a": uniform_layer(-10.0)}), 0.3, "length")
    assert found.threshold.value(1024) == pytest.approx(math.exp(-7.0), rel=0.02)
    assert found.threshold.b == pytest.approx(10.0, rel=0.02)  # ten units of ln λ for all tiles
    assert found.threshold.target == 0.3


def test_length_follows_the_length_where_static_cannot():
    layers = {"a": uniform_layer(-10.0, lengths=3, shift=-1.0)}  # every doubling moves all gaps down by ln 2
    curves = {name: fit(histogram(layers, (1024, 2048, 4096)), 0.3, name) for name in ("static", "length")}
    spread = {name: np.ptp([one.sparsity for one in found.lengths.values()]) for name, found in curves.items()}
    assert spread["length"] < spread["static"] / 2
    middle = [(max(v) + min(v)) / 2 for v in ([one.sparsity for one in f.lengths.values()] for f in curves.values())]
    assert middle == pytest.approx([0.3, 0.3], abs=2e-3)


def test_balanced_takes_tiles_where_they_are_cheap():
    layers = {"cheap": uniform_layer(-10.0, mass=1e-6), "dear": uniform_layer(-10.0, mass=1e-2)}
    balanced, length = (fit(histogram(layers), 0.4, name) for name in ("balanced", "length"))
    assert balanced.lengths[1024].sparsity == pytest.approx(0.4, abs=0.005)
    assert balanced.layers["cheap"].value(1024) > 10 * balanced.layers["dear"].value(1024)
    assert balanced.lengths[1024].mass < length.lengths[1024].mass / 5


def test_balanced_never_drops_more_mass_than_one_threshold_on_a_model():
    collected = collect(peaky_llama(layers=4), CONFIG, random_texts(3, 192), lengths=[192])["prefill"]
    for target in (0.1, 0.2, 0.3):
        balanced, length = (fit(collected, target, name).lengths[192] for name in ("balanced", "length"))
        assert balanced.sparsity == pytest.approx(target, abs=0.01)
        assert balanced.mass <= length.mass * 1.01


def test_balanced_levels_the_lengths():
    growing, steady = uniform_layer(-6.0, lengths=3, shift=-3.0), uniform_layer(-6.0, lengths=3, shift=-1.0)
    layers, lengths = {"growing": growing, "steady": steady}, (1024, 2048, 4096)
    spread = {
        name: np.ptp([one.sparsity for one in fit(histogram(layers, lengths), 0.3, name).lengths.values()])
        for name in ("balanced", "length")
    }
    assert spread["balanced"] <= 0.045
    assert spread["balanced"] < spread["length"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_out_of_reach_is_reported_with_the_most(strategy):
    layer = uniform_layer(-10.0)
    layer.tiles[0, 0, -1] += 6000  # gaps of 0: no λ skips them
    found = fit(histogram({"a": layer}), 0.7, strategy)
    assert found.out_of_reach() == {1024: pytest.approx(0.4, abs=0.01)}
    assert found.lengths[1024].sparsity == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_targets_outside_are_refused(target):
    with pytest.raises(UsageError, match="between 0 and 1"):
        fit(histogram({"a": uniform_layer(-10.0)}), target)


def test_unknown_strategy_is_refused():
    with pytest.raises(UsageError, match="unknown strategy"):
        fit(histogram({"a": uniform_layer(-10.0)}), 0.5, "best")


def test_a_correction_moves_the_fit_and_keeps_the_target():
    plain, moved = (fit(histogram({"a": uniform_layer(-10.0)}), 0.3, correction=c) for c in (0.0, 0.05))
    assert moved.threshold.value(1024) == pytest.approx(plain.threshold.value(1024) * math.exp(-0.5), rel=0.02)
    assert moved.threshold.target == 0.3


def test_default_lengths():
    assert default_lengths(8192, 128, 128) == (1024, 2048, 4096, 8192)
    assert default_lengths(600, 128, 128) == (600,)
    assert default_lengths(2048, 128, 128) == (512, 1024, 2048)
