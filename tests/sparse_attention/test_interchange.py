"""Records of other tools: curves cross over exactly, both ways; what a format cannot say is said."""

import math

import pytest

from sparse_attention import load_config
from sparse_attention.errors import ConfigError
from sparse_attention.interchange import (
    from_checkpoint_record,
    from_edge_llm,
    from_tensorrt_llm,
    to_checkpoint_record,
    to_edge_llm,
    to_tensorrt_llm,
)
from sparse_attention.interchange_modelopt import MODELOPT_PRESETS, from_modelopt, to_modelopt

CURVE = {"target": 0.5, "a": 7.93, "b": 8.61}
BOTH = {"prefill": CURVE, "decode": {**CURVE, "a": 0.12}}
CALIBRATED = load_config({"sparse_cfg": {"*attn*": {"calibration": BOTH}}})
BALANCED = load_config(
    {"sparse_cfg": {"*attn*": {"calibration": {
        "strategy": "balanced", "prefill": CURVE, "layers": {"model.layers.0.self_attn": {"prefill": CURVE}}}}}}
)  # fmt: skip
STATIC = load_config({"sparse_cfg": {"*attn*": {"threshold": {"prefill": 0.1, "decode": 0.0}}}})

# ModelOpt's record as its versions wrote it: factor at the top (until May 2026), then inside the group.
OLD = {
    "config_groups": {"group_0": {"sparse_algo": "softmax_skip", "targets": ["LlamaAttention"]}},
    "threshold_scale_factor": {
        "formula": "a * exp(b * target_sparsity)", "prefill": {"a": 7.93, "b": 8.61}, "decode": {"a": 0.12, "b": 9.85},
    },
    "producer": {"name": "modelopt", "version": "0.43.0"},
}  # fmt: skip
NEW = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax", "targets": ["LlamaAttention"], "ignore": ["model.layers.0.self_attn"],
            "threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 7.93, "b": 8.61}},
            "target_sparsity": {"prefill": 0.4, "decode": 0.5},
        },
        "group_1": {"algorithm": "sparse_softmax", "targets": ["LlamaAttention"], "sparsity_n": 2, "sparsity_m": 4},
    },
    "producer": {"name": "modelopt", "version": "0.47.0"},
}  # fmt: skip


def curve(config, phase="prefill"):
    return config.calibration[1].fitted[phase]


def test_record_there_and_back():
    exported = to_checkpoint_record(CALIBRATED, ["LlamaAttention"])
    assert from_checkpoint_record(exported.record).config.calibration[1].fitted == CALIBRATED.calibration[1].fitted
    group = exported.record["config_groups"]["group_0"]
    assert group["threshold_scale_factor"] == exported.record["threshold_scale_factor"]
    assert group["threshold_scale_factor"]["formula"] == "a * exp(b * target_sparsity)"
    assert any("64 x 128" in note for note in exported.notes)


def test_old_record():
    found = from_checkpoint_record({"model_type": "llama", "sparse_attention_config": OLD})
    assert (curve(found.config).a, curve(found.config).b, curve(found.config).target) == (7.93, 8.61, 0.5)
    assert curve(found.config, "decode").b == 9.85
    assert list(found.config.sparse_cfg) == ["LlamaAttention", "default"]
    assert any("0.5 is assumed" in note for note in found.notes)


def test_new_record():
    found = from_checkpoint_record(NEW)
    assert curve(found.config).target == 0.4
    assert set(found.config.calibration[1].fitted) == {"prefill"}
    assert found.config.sparse_cfg["*model.layers.0.self_attn*"] == {"enable": False}
    assert any("sparse_softmax" in note for note in found.notes)


def test_records_that_cannot_be_computed():
    with pytest.raises(ConfigError, match="unknown formula"):
        from_checkpoint_record({"threshold_scale_factor": {"formula": "a * target + b", "prefill": {"a": 1, "b": 1}}})
    with pytest.raises(ConfigError, match="no threshold_scale_factor"):
        from_checkpoint_record({"config_groups": {}})
    with pytest.raises(ConfigError, match="must hold mappings"):
        from_checkpoint_record({"config_groups": {"group_0": 3}})


def test_what_a_record_cannot_say_is_said():
    assert any("1 single layers" in note for note in to_checkpoint_record(BALANCED).notes)
    with pytest.raises(ConfigError, match="no threshold that the format can express"):
        to_checkpoint_record(STATIC)
    exported = to_tensorrt_llm(STATIC, length=4096)
    assert exported.record["threshold_scale_factor"] == {"prefill": pytest.approx(409.6)}
    assert any("4096 tokens only" in note for note in exported.notes)


def test_tensorrt_llm_there_and_back():
    exported = to_tensorrt_llm(CALIBRATED)
    assert exported.record["threshold_scale_factor"]["prefill"] == pytest.approx(7.93 * math.exp(8.61 * 0.5))
    back = from_tensorrt_llm(exported.record).config
    for length in (1024, 65536):
        for phase in ("prefill", "decode"):
            assert curve(back, phase).value(length) == pytest.approx(curve(CALIBRATED, phase).value(length))
    targets = to_tensorrt_llm(CALIBRATED, resolved=False).record
    assert targets == {"algorithm": "skip_softmax", "target_sparsity": {"prefill": 0.5, "decode": 0.5}}


def test_tensorrt_llm_with_targets_needs_the_record():
    found = from_tensorrt_llm({"target_sparsity": {"prefill": 0.3}}, OLD).config
    assert curve(found).value(8192) == pytest.approx(7.93 * math.exp(8.61 * 0.3) / 8192)
    assert set(found.calibration[1].fitted) == {"prefill"}
    with pytest.raises(ConfigError, match="needs the curve"):
        from_tensorrt_llm({"target_sparsity": 0.3})
    both = from_tensorrt_llm({"threshold_scale_factor": 100.0, "target_sparsity": 0.3})
    assert curve(both.config, "decode").value(1000) == pytest.approx(0.1)
    assert any("wins" in note for note in both.notes)
    with pytest.raises(ConfigError, match="only skip-softmax"):
        from_tensorrt_llm({"algorithm": "rocket"})


def test_edge_llm_there_and_back():
    exported = to_edge_llm(CALIBRATED)
    assert any("prefill only" in note for note in exported.notes)
    back = from_edge_llm(exported.record).config
    assert curve(back).value(4096) == pytest.approx(curve(CALIBRATED).value(4096))
    assert set(back.calibration[1].fitted) == {"prefill"}
    with pytest.raises(ConfigError, match="no phase has a scale factor"):
        from_edge_llm({"skip_softmax_scale_factor": 0.0})


@pytest.mark.parametrize("name", MODELOPT_PRESETS)
@pytest.mark.parametrize("version", ["0.41", "0.42", "0.43", "0.47"])
def test_modelopt_presets_there_and_back(name, version):
    config = from_modelopt(name).config
    back = from_modelopt(to_modelopt(config, version).record).config
    ours, theirs = ({k: v for k, v in one.sparse_cfg["*attn*"].items() if k != "backend"} for one in (config, back))
    if not isinstance(ours.get("threshold", {}), dict):  # one λ for both phases is written per phase
        ours["threshold"] = dict.fromkeys(("prefill", "decode"), ours["threshold"])
    if not isinstance(theirs.get("threshold", {}), dict):
        theirs["threshold"] = dict.fromkeys(("prefill", "decode"), theirs["threshold"])
    assert ours == theirs


def test_modelopt_spellings():
    old = {"sparse_cfg": {"*attn*": {"threshold": {"prefill": 1e-3, "default": 1e-4}}, "default": {"enable": False}}}
    assert from_modelopt(old).config.sparse_cfg["*attn*"]["threshold"] == {"prefill": 1e-3, "decode": 1e-4}
    several = {"sparse_cfg": {"*attn*": {"thresholds": {"prefill": [1e-3, 1e-2], "decode": [1e-4, 1e-3]}}}}
    found = from_modelopt(several)
    assert found.config.sparse_cfg["*attn*"]["threshold"] == {"prefill": 1e-3, "decode": 1e-4}
    assert any("the first is applied" in note for note in found.notes)
    inside = {"sparse_cfg": {"*attn*": {"calibration": {"target_sparse_ratio": {"prefill": 0.9, "decode": 0.0}}}}}
    calibration = from_modelopt(inside).config.calibration[1]
    assert calibration.prefill.target == 0.9 and calibration.decode is None


def test_modelopt_methods_that_are_other_algorithms():
    for method in ("vsa", "triton_sparse_softmax"):
        with pytest.raises(ConfigError, match="another algorithm"):
            from_modelopt({"sparse_cfg": {"*attn*": {"method": method}}})
    with pytest.raises(ConfigError, match="not a skip-softmax preset"):
        from_modelopt("VSA_DEFAULT")
    combined = {"sparse_cfg": {"*attn*": {"threshold": 0.1, "export_sparse_softmax": True, "sparsity_n": 2}}}
    assert any("N:M" in note for note in from_modelopt(combined).notes)


def test_modelopt_is_told_what_it_cannot_hold():
    exported = to_modelopt(BALANCED)
    assert exported.record["sparse_cfg"]["calibration"]["target_sparse_ratio"] == {"prefill": 0.5, "decode": 0.0}
    assert any("curves are left out" in note for note in exported.notes)
    assert any("strategy balanced" in note for note in exported.notes)
    assert any("λ = 0" in note for note in to_modelopt(STATIC).notes)
    with pytest.raises(ConfigError, match="has sparse_cfg"):
        from_modelopt({"quant_cfg": {}})
