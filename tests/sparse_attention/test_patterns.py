"""Patterns on module and class names: who is found, whose settings win, and what an error lists."""

import pytest

from sparse_attention.config import FlashSkipSoftmaxConfig, SparseAttentionConfig
from sparse_attention.errors import ConfigError, ModelError
from sparse_attention.patterns import AttentionModule, match, resolve
from sparse_attention.threshold import PhaseThreshold, Thresholds

LLAMA = [AttentionModule(f"model.layers.{i}.self_attn", "LlamaAttention") for i in range(12)]
FIRST, SECOND = LLAMA[0].name, LLAMA[1].name
CURVE = {"target": 0.5, "a": 20.0, "b": 4.0}
FITTED = PhaseThreshold(a=20.0, b=4.0, target=0.5)


def config(**patterns: dict) -> SparseAttentionConfig:
    return SparseAttentionConfig(sparse_cfg=patterns)


def settings(**patterns: dict):
    return resolve(config(**patterns), LLAMA)


def last_layer(name: str) -> bool:
    return name.endswith("11.self_attn")


@pytest.mark.parametrize("pattern", ["*attention*", "*ATTENTION*", "LlamaAttention", "*self_attn", "model.layers.*"])
def test_a_pattern_matches_the_name_or_the_class_in_any_case(pattern):
    assert match(config(**{pattern: {}}), LLAMA) == {pattern: tuple(module.name for module in LLAMA)}


def test_a_pattern_matches_whole_names():
    assert match(config(**{"*layers.1.*": {}}), LLAMA) == {"*layers.1.*": (SECOND,)}
    with pytest.raises(ConfigError):
        match(config(attention={}), LLAMA)


def test_the_published_default_enables_every_candidate():
    for resolved in resolve(FlashSkipSoftmaxConfig(), LLAMA).values():
        assert resolved.enable and resolved.backend == "pytorch" and (resolved.br, resolved.bc) == (128, 128)
        assert resolved.thresholds == Thresholds.of({"prefill": 0.001, "decode": 0.0001})
        assert not resolved.is_causal_explicit


def test_without_a_threshold_the_field_default_applies():
    assert resolve(SparseAttentionConfig(), LLAMA)[FIRST].thresholds == Thresholds.of(0.001)


def test_default_comes_first_wherever_it_stands_and_later_patterns_override_field_by_field():
    resolved = settings(
        **{"*attention*": {"br": 64, "bc": 64}, "*layers.0.*": {"bc": 32}, "default": {"br": 16, "is_causal": False}}
    )
    assert (resolved[FIRST].br, resolved[FIRST].bc) == (64, 32)
    assert (resolved[SECOND].br, resolved[SECOND].bc) == (64, 64)
    assert not resolved[FIRST].is_causal and resolved[FIRST].is_causal_explicit
    reversed_order = settings(**{"*layers.0.*": {"bc": 32}, "*attention*": {"br": 64, "bc": 64}})
    assert reversed_order[FIRST].bc == 64


def test_enable():
    resolved = settings(**{"*layers.0.*": {"threshold": 0.1}, "default": {"enable": False}})
    assert resolved[FIRST].enable and not resolved[SECOND].enable
    resolved = settings(**{"*layers.0.*": {"threshold": 0.1}})
    assert resolved[FIRST].enable and not resolved[SECOND].enable
    resolved = settings(**{"*attention*": {}, "*layers.1.*": {"enable": False}, "*.1.*": {"br": 64}})
    assert resolved[FIRST].enable and not resolved[SECOND].enable
    resolved = settings(**{"*attention*": {"enable": False}, "*layers.1.*": {"enable": True}})
    assert not resolved[FIRST].enable and resolved[SECOND].enable
    resolved = settings(**{"*layers.0.*": {"enable": False}, "default": {"enable": True}})
    assert not resolved[FIRST].enable and resolved[SECOND].enable


def test_thresholds_override_phase_by_phase():
    resolved = settings(**{"*attention*": {"threshold": 0.1}, "*layers.0.*": {"threshold": {"prefill": 0.2}}})
    assert resolved[FIRST].thresholds == Thresholds.of({"prefill": 0.2, "decode": 0.1})
    resolved = settings(**{"*attention*": {"threshold": {"prefill": 0.2}}})
    assert resolved[FIRST].thresholds == Thresholds.of({"prefill": 0.2})  # a phase that nobody names is dense


def test_calibration_results():
    calibrated = {"calibration": {"prefill": CURVE, "decode": {"target": 0.5}}, "threshold": {"decode": 0.3}}
    resolved = settings(**{"*attention*": calibrated, "*layers.1.*": {"threshold": {"prefill": 0.2}}})
    assert resolved[FIRST].thresholds == Thresholds(prefill=FITTED, decode=PhaseThreshold(0.3))
    assert resolved[SECOND].thresholds == Thresholds.of({"prefill": 0.2, "decode": 0.3})


def test_calibration_per_layer():
    layers = {SECOND: {"prefill": {"target": 0.7, "threshold": 0.4}}}
    resolved = settings(
        **{"*attention*": {"calibration": {"strategy": "balanced", "prefill": CURVE, "layers": layers}}}
    )
    assert resolved[FIRST].thresholds.prefill == FITTED
    assert resolved[SECOND].thresholds.prefill == PhaseThreshold(0.4)
    with pytest.raises(ConfigError, match="does not reach") as caught:
        settings(**{"*layers.0.*": {"calibration": {"layers": layers}}})
    assert caught.value.found == SECOND


def test_a_calibration_not_yet_run_changes_no_threshold():
    resolved = settings(**{"*attention*": {"threshold": 0.2, "calibration": {}}})
    assert resolved[FIRST].thresholds == Thresholds.of(0.2)


def test_callables_take_the_module_name():
    resolved = resolve(SparseAttentionConfig(sparse_cfg={last_layer: {"br": 64}}), LLAMA)
    assert [name for name, module in resolved.items() if module.enable] == [LLAMA[11].name]


def test_a_failing_callable_is_named():
    with pytest.raises(ConfigError) as caught:
        resolve(SparseAttentionConfig(sparse_cfg={lambda name: name.nope: {}}), LLAMA)
    assert "AttributeError" in caught.value.found and FIRST in caught.value.found


def test_a_pattern_that_matches_nothing_lists_what_could_have_been():
    with pytest.raises(ConfigError) as caught:
        settings(**{"*attention*": {}, "*atention*": {}})
    error = caught.value
    assert error.found == '"*atention*"'
    assert "12 attention modules" in error.fix and f"{FIRST} (LlamaAttention)" in error.fix and "4 more" in error.fix


def test_nothing_to_do_is_an_error():
    with pytest.raises(ModelError, match="computes attention"):
        resolve(SparseAttentionConfig(), [])
    with pytest.raises(ConfigError, match="no pattern"):
        settings()
    assert not any(module.enable for module in settings(default={"enable": False}).values())


def test_resolved_settings_are_plain_data():
    plain = resolve(FlashSkipSoftmaxConfig(), LLAMA)[FIRST].as_dict()
    assert plain["thresholds"]["prefill"] == {"threshold": 0.001, "a": 0.0, "b": 0.0, "target": 0.0}
