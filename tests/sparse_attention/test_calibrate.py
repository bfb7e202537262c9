"""Calibration from end to end: targets met on other text, results that survive, bad input, runs that are cut off."""

import math

import pytest
import torch
from attention_models import tiny
from calibration_models import CONFIG, peaky_llama, random_texts

from sparse_attention import layers_of, load_config, restore, save_config, sparsify
from sparse_attention.calibrate import calibrate, collect
from sparse_attention.errors import ConfigError, ModelError, UsageError
from sparse_attention.gap_files import merge_files
from sparse_attention.layer import AttentionLayer
from sparse_attention.retarget import at_target
from sparse_attention.trial import trial

TARGETS = {"prefill": 0.25, "decode": 0.4}


@pytest.fixture(scope="module")
def model():
    return peaky_llama(layers=3)


@pytest.fixture(scope="module")
def texts():
    return random_texts(6, 256)


@pytest.mark.parametrize("strategy", ["static", "length", "balanced"])
def test_targets_are_met_on_other_text(model, texts, strategy):
    other = random_texts(3, 256, seed=5)
    found = calibrate(model, CONFIG, texts, targets=TARGETS, strategy=strategy, lengths=[256], held_out=other, refine=1)
    assert not layers_of(model)  # given back as it came
    for phase, target in TARGETS.items():
        assert found.achieved[phase][256].sparsity == pytest.approx(target, abs=0.03)
        assert found.fits[phase].lengths[256].most > target
    assert found.missed() == []
    calibration = found.config.calibration[1]
    assert calibration.strategy == strategy and calibration.found == {"prefill", "decode"}
    per_layer = {f"model.layers.{i}.self_attn" for i in range(3)} if strategy == "balanced" else set()
    assert set(calibration.layers) == per_layer


def test_the_strategy_that_nobody_chose(model, texts):
    def chosen(**of_calibration):
        calibration = {"prefill": {"target": 0.2}, **of_calibration}
        config = {"sparse_cfg": {"*attention*": {"br": 8, "bc": 8, "calibration": calibration}}}
        return calibrate(model, config, texts[:1], lengths=[256]).config.calibration[1].strategy

    assert chosen() == "balanced"
    assert chosen(strategy="static") == "static"


def test_the_target_is_met_where_the_texts_end(model, texts):
    def fitted(batches, **options):
        found = calibrate(
            model, CONFIG, batches, targets={"prefill": 0.25, "decode": 0.4}, strategy="length", **options
        )
        return [list(found.fits[phase].lengths) for phase in ("prefill", "decode")]

    assert list(calibrate(model, CONFIG, texts, targets=TARGETS).histograms["prefill"].reached) == [32, 64, 128, 256]
    assert fitted(texts) == [[256], [256]]
    assert fitted([*texts, texts[0][:, :128]]) == [[128, 256], [128, 256]]
    assert fitted([*texts, texts[0][:, :64], texts[0][:, :40]]) == [[64, 256], [64, 256]]
    assert fitted(texts, lengths=[64, 128, 256]) == [[64, 128, 256]] * 2
    found = calibrate(model, CONFIG, texts, targets=TARGETS, strategy="length")
    assert {phase: fit.lengths[256].sparsity for phase, fit in found.fits.items()} == pytest.approx(TARGETS, abs=0.01)


def test_the_result_survives_a_file_and_reaches_every_layer(model, texts, tmp_path):
    found = calibrate(model, CONFIG, texts[:2], targets=TARGETS, strategy="balanced", lengths=[256])
    again = load_config(save_config(found.config, tmp_path / "calibrated.json"))
    assert again == found.config
    with trial(model, again) as layers:
        for layer in layers:
            assert layer.thresholds.prefill == found.fits["prefill"].layers[layer.name]
            assert layer.thresholds.prefill.a > 0
    observed = again.calibration[1].prefill.observed
    assert observed["lengths"]["256"]["sparsity"] == pytest.approx(0.25, abs=0.01)
    assert observed["unit"] == "head" and again.calibration[1].decode.observed["unit"] == "group"


def test_a_curve_moves_to_another_target(model, texts):
    found = calibrate(model, CONFIG, texts, targets={"prefill": 0.25}, strategy="length", lengths=[256])
    curve = found.histograms["prefill"].curve(256)
    moved = at_target(found.config, {"prefill": 0.22})
    value = moved.calibration[1].fitted["prefill"].value(256)
    assert curve.sparsity(value) == pytest.approx(0.22, abs=0.01)
    with pytest.raises(ConfigError, match="no calibrated curve"):
        at_target(found.config, {"decode": 0.3})
    with pytest.raises(UsageError):
        at_target(found.config, {"prefill": 1.0})


def test_out_of_reach_is_said(model, texts):
    found = calibrate(model, CONFIG, texts[:2], targets={"prefill": 0.95}, strategy="length", lengths=[256])
    assert len(found.missed()) == 1 and "out of reach" in found.missed()[0]
    assert found.config.calibration[1].prefill.observed["out_of_reach"]["256"] < 0.6


def test_sparsified_models_keep_their_layers(model, texts):
    sparsify(model, {"sparse_cfg": {"*attention*": {"br": 8, "bc": 8, "threshold": 0.5}}})
    try:
        before = [(layer, layer.settings, layer.statistics) for layer in layers_of(model)]
        calibrate(model, CONFIG, texts[:1], targets={"prefill": 0.2}, held_out=texts[1:2])
        assert [(layer, layer.settings, layer.statistics) for layer in layers_of(model)] == before
        assert all(layer.substitute is None for layer in layers_of(model))
    finally:
        restore(model)


def test_only_the_calibrating_pattern_is_collected(model, texts):
    config = {"sparse_cfg": {"*layers.[01].*": {"br": 8, "bc": 8, "calibration": {"prefill": {"target": 0.2}}},
                             "*layers.2.*": {"enable": False}}}  # fmt: skip
    found = calibrate(model, config, texts[:1], lengths=[256])
    assert list(found.histograms["prefill"].layers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert list(found.fits) == ["prefill"]


def test_encoders_calibrate_prefill_only():
    model = tiny("bert", sharpness=6.0)
    batches = [torch.randint(1, 64, (2, 96), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = calibrate(model, CONFIG, batches, targets={"prefill": 0.05, "decode": 0.5}, lengths=[96], held_out=batches)
    assert list(found.fits) == ["prefill"]
    assert found.achieved["prefill"][96].sparsity == pytest.approx(0.05, abs=0.03)


# Bad input


def test_too_little_text(model):
    with pytest.raises(UsageError, match="too little text"):
        calibrate(model, CONFIG, [], targets=TARGETS)


def test_text_shorter_than_a_tile(model):
    with pytest.raises(UsageError, match="shorter than a tile"):
        calibrate(model, CONFIG, random_texts(2, 8), targets=TARGETS)


@pytest.mark.parametrize("target", [1.0, 1.5, -0.5, math.nan])
def test_impossible_targets(model, texts, target):
    with pytest.raises(UsageError, match="between 0 and 1"):
        calibrate(model, CONFIG, texts, targets={"prefill": target})


def test_a_target_of_zero_leaves_the_phase_out(model, texts):
    found = calibrate(model, CONFIG, texts[:1], targets={"prefill": 0.2, "decode": 0.0}, lengths=[256])
    assert list(found.fits) == ["prefill"]
    with trial(model, found.config) as layers:
        assert layers[0].thresholds.decode.is_dense
    with pytest.raises(UsageError, match="every target is 0"):
        calibrate(model, CONFIG, texts[:1], targets={"prefill": 0.0})


def test_no_target_at_all(model, texts):
    with pytest.raises(ConfigError, match="no target"):
        calibrate(model, CONFIG, texts)


def test_another_tokenizer(model):
    with pytest.raises(ModelError, match="vocabulary"):
        calibrate(model, CONFIG, random_texts(1, 128, vocab=500), targets=TARGETS)


def test_nan_in_the_scores():
    broken = peaky_llama()
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="NaN") as error:
        calibrate(broken, CONFIG, random_texts(1, 128), targets=TARGETS)
    assert "model.layers.1.self_attn" in str(error.value)
    assert not layers_of(broken)


@pytest.mark.parametrize("lengths", [[512], [8], [64, 300]])
def test_lengths_that_the_texts_cannot_show(model, texts, lengths):
    with pytest.raises(UsageError, match="lengths"):
        calibrate(model, CONFIG, texts[:1], targets=TARGETS, lengths=lengths)


class Cut(Exception):
    """Stands for whatever ends a process."""


def test_a_run_that_was_cut_off_goes_on(model, texts, tmp_path, monkeypatch):
    state = tmp_path / "state.safetensors"
    whole = collect(model, CONFIG, texts, lengths=[256])
    monkeypatch.setattr("sparse_attention.calibration_collect._SAVE_EVERY", 0.0)

    def cut_after_four(what, done, total):
        if done == 4:
            raise Cut

    with pytest.raises(Cut):
        collect(model, CONFIG, texts, lengths=[256], state=state, progress=cut_after_four)
    runs = []
    real = AttentionLayer.run
    monkeypatch.setattr(AttentionLayer, "run", lambda layer, call: runs.append(layer.name) or real(layer, call))
    again = collect(model, CONFIG, texts, lengths=[256], state=state)
    assert len(runs) == 2 * 3  # the two texts that were missing, in three layers
    for phase in whole:
        for name, gaps in whole[phase].layers.items():
            assert torch.equal(again[phase].layers[name].tiles, gaps.tiles)
            assert torch.equal(again[phase].layers[name].mass, gaps.mass)
    assert torch.equal(merge_files([state])["prefill"].sequences, whole["prefill"].sequences)


def test_a_state_file_of_another_run_is_refused(model, texts, tmp_path):
    state = tmp_path / "state.safetensors"
    collect(model, CONFIG, texts[:2], lengths=[256], state=state)
    with pytest.raises(UsageError, match="another run"):
        collect(model, CONFIG, texts[:2], lengths=[128, 256], state=state)
    with pytest.raises(UsageError, match="another run"):
        collect(peaky_llama(seed=3, layers=3), CONFIG, texts[:2], lengths=[256], state=state)
    with pytest.raises(UsageError, match="texts that this run does not have"):
        collect(model, CONFIG, texts[1:3], lengths=[256], state=state)


def test_models_spread_over_devices(texts):
    accelerate = pytest.importorskip("accelerate", reason="device_map needs the package accelerate")
    model, spread = peaky_llama(layers=2), peaky_llama(layers=2)
    places = dict.fromkeys(("model", "lm_head"), "cpu")
    accelerate.dispatch_model(spread, places, force_hooks=True)  # hooks move all a module is given, as between GPUs
    whole, parts = (collect(one, CONFIG, texts[:1], lengths=[256]) for one in (model, spread))
    for name, gaps in whole["prefill"].layers.items():
        assert torch.equal(parts["prefill"].layers[name].tiles, gaps.tiles)
