"""The configuration classes: defaults as published, and a refusal that names the key for everything else."""

import json
import math

import pytest
from pydantic import ValidationError

from sparse_attention.config import (
    CalibrationConfig,
    FlashSkipSoftmaxConfig,
    SparseAttentionAttributeConfig,
    SparseAttentionConfig,
)
from sparse_attention.config_base import config_error
from sparse_attention.config_calibration import PhaseCalibration
from sparse_attention.errors import ConfigError

# Written as on the configuration page, key order included.
PUBLISHED = {
    FlashSkipSoftmaxConfig: """{"sparse_cfg": {"*attention*": {"backend": "pytorch", "bc": 128, "br": 128,
        "enable": true, "method": "flash_skip_softmax", "threshold": {"decode": 0.0001, "prefill": 0.001}},
        "default": {"enable": false}}, "export_format": null}""",
    SparseAttentionAttributeConfig: """{"method": "flash_skip_softmax", "enable": true, "threshold": 0.001,
        "br": 128, "bc": 128, "backend": "pytorch", "is_causal": true, "calibration": null}""",
    SparseAttentionConfig: """{"sparse_cfg": {"*attention*": {"enable": true, "method": "flash_skip_softmax"},
        "default": {"enable": false}}, "export_format": null}""",
}


def only_attention(module_name: str) -> bool:
    return module_name.endswith("self_attn")


class Holder:
    @staticmethod
    def nested(module_name: str) -> bool:
        return True


def refused(**settings: object) -> ConfigError:
    with pytest.raises(ValidationError) as caught:
        SparseAttentionConfig.model_validate({"sparse_cfg": {"*attention*": settings}})
    return config_error(caught.value, "recipe.yaml")


@pytest.mark.parametrize("cls", PUBLISHED)
def test_defaults_are_the_published_ones(cls):
    expected = json.dumps(json.loads(PUBLISHED[cls]))  # compared as text: keys, values and their order
    assert json.dumps(json.loads(cls().model_dump_json())) == expected
    assert cls.model_validate_json(expected) == cls()


def test_inner_dicts_stay_as_they_were_given():
    given = {"bc": 32, "enable": False, "br": 64}
    config = SparseAttentionConfig(sparse_cfg={"*x*": given, "default": {}})
    assert list(config.sparse_cfg["*x*"].items()) == list(given.items())
    assert config.sparse_cfg["default"] == {}
    given["br"] = 1
    assert config.sparse_cfg["*x*"]["br"] == 64


def test_attribute_objects_are_accepted_and_keep_only_what_was_set():
    config = SparseAttentionConfig(sparse_cfg={"*x*": SparseAttentionAttributeConfig(br=64)})
    assert config.sparse_cfg == {"*x*": {"br": 64}}


def test_configurations_are_frozen():
    with pytest.raises(ValidationError):
        SparseAttentionConfig().export_format = "onnx"


@pytest.mark.parametrize(
    ("settings", "path", "says"),
    [
        ({"threshold": {"prefil": 0.1}}, "threshold.prefil", 'did you mean "prefill"? allowed: prefill, decode'),
        ({"treshold": 0.1}, "treshold", 'did you mean "threshold"?'),
        ({"threshold": 1}, "threshold", "[0, 1)"),
        ({"threshold": -0.1}, "threshold", "[0, 1)"),
        ({"threshold": math.nan}, "threshold", "[0, 1)"),
        ({"threshold": math.inf}, "threshold", "[0, 1)"),
        ({"threshold": {"decode": 1.0}}, "threshold.decode", "[0, 1)"),
        ({"threshold": {}}, "threshold", "at least 1"),
        ({"threshold": "0.1"}, "threshold", "number"),
        ({"threshold": True}, "threshold", "number"),
        ({"thresholds": {"prefill": [0.1, 0.2]}}, "thresholds.prefill", "one value a phase, not 2"),
        ({"thresholds": {"prefill": []}}, "thresholds.prefill", "one value a phase, not 0"),
        ({"thresholds": {"prefill": [2.0]}}, "threshold.prefill", "[0, 1)"),
        ({"thresholds": {"prefill": [0.1]}, "threshold": 0.1}, "thresholds", "newer spelling of threshold"),
        ({"br": 0}, "br", "greater than or equal to 1"),
        ({"bc": -128}, "bc", "greater than or equal to 1"),
        ({"br": 128.5}, "br", "integer"),
        ({"br": True}, "br", "integer"),
        ({"enable": 1}, "enable", "boolean"),
        ({"method": "flash_softmax_skip"}, "method", 'did you mean "flash_skip_softmax"?'),
        ({"backend": "triton"}, "backend", "allowed: pytorch, cuda"),
        ({"calibration": {"prefil": {"target": 0.5}}}, "calibration.prefil", 'did you mean "prefill"?'),
        ({"calibration": {"prefill": {"target": 1.0}}}, "calibration.prefill.target", "less than 1"),
        ({"calibration": {"prefill": {"target": 0.0}}}, "calibration.prefill.target", "greater than 0"),
        ({"calibration": {"prefill": {"target": 0.5, "a": 2.0}}}, "calibration.prefill", "a and b come together"),
        ({"calibration": {"prefill": {"target": 0.5, "a": 0.0, "b": 1.0}}}, "calibration.prefill.a", "greater than 0"),
        ({"calibration": {"target_sparse_ratio": 0}}, "calibration", "names no phase"),
        ({"calibration": {"target_sparse_ratio": {"x": 0.5}}}, "calibration.x", "unknown key"),
        (
            {"calibration": {"prefill": {"target": 0.5, "a": 1.0, "b": 1.0, "threshold": 0.1}}},
            "calibration.prefill",
            "either a and b, or threshold",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_path_of_the_key(settings, path, says):
    error = refused(**settings)
    assert error.where == f'recipe.yaml: sparse_cfg["*attention*"].{path}'
    assert says in error.fix
    assert error.exit_code == 2


def test_top_level_keys_and_export_formats_are_checked():
    for given, says in (({"export_format": "onx"}, "onnx, tensorrt"), ({"sparse_config": {}}, "sparse_cfg")):
        with pytest.raises(ValidationError) as caught:
            SparseAttentionConfig.model_validate(given)
        error = config_error(caught.value)
        assert error.where == next(iter(given))
        assert says in error.fix


def test_several_mistakes_are_all_listed():
    message = str(refused(br=0, bc=0, backend="x"))
    assert "3 mistakes" in message
    assert all(f'sparse_cfg["*attention*"].{key} = ' in message for key in ("br", "bc", "backend"))


def test_a_huge_value_makes_a_short_message():
    bomb: object = "x"
    for _ in range(60):  # 2**60 leaves when written out
        bomb = [bomb, bomb]
    assert len(str(refused(threshold=bomb))) < 1000


@pytest.mark.parametrize(
    ("newer", "threshold"),
    [
        ({"prefill": [0.001]}, {"prefill": 0.001}),
        ({"prefill": [0.001], "decode": [0.0]}, {"prefill": 0.001, "decode": 0.0}),
        ({"decode": 0.25}, {"decode": 0.25}),
        (0.5, 0.5),
    ],
)
def test_the_newer_spelling_is_normalised(newer, threshold):
    config = SparseAttentionConfig(sparse_cfg={"*x*": {"bc": 1, "thresholds": newer, "br": 2}})
    assert list(config.sparse_cfg["*x*"].items()) == [("bc", 1), ("threshold", threshold), ("br", 2)]


class TestCalibration:
    def test_only_one_pattern_carries_it(self):
        with pytest.raises(ValidationError, match=r'only one pattern may carry calibration, but 2 do: "a", "b"'):
            SparseAttentionConfig(sparse_cfg={"a": {"calibration": {}}, "b": {"calibration": {}}, "c": {}})
        one = SparseAttentionConfig(sparse_cfg={"a": {"calibration": {}}, "b": {"calibration": None}})
        assert one.calibration is not None and one.calibration[0] == "a"
        assert SparseAttentionConfig().calibration is None

    @pytest.mark.parametrize(
        ("given", "targets"),
        [
            ({}, {"prefill": 0.5, "decode": 0.5}),
            ({"target_sparse_ratio": 0.3, "samples": 24, "max_seqlen": 8192}, {"prefill": 0.3, "decode": 0.3}),
            ({"target_sparse_ratio": {"prefill": 0.7, "decode": 0.0}}, {"prefill": 0.7}),
            ({"decode": {"target": 0.2}}, {"decode": 0.2}),
        ],
    )
    def test_requests(self, given, targets):
        calibration = CalibrationConfig.model_validate(given)
        phases = {"prefill": calibration.prefill, "decode": calibration.decode}
        assert {name: phase.target for name, phase in phases.items() if phase} == targets
        assert calibration.pending == tuple(targets)
        assert calibration.fitted == {}

    def test_a_result_replaces_the_static_threshold_of_its_phases(self):
        result = CalibrationConfig(prefill=PhaseCalibration(target=0.5, a=20.0, b=4.0, observed={"2048": 0.48}))
        config = FlashSkipSoftmaxConfig().calibrated(result)
        settings = config.sparse_cfg["*attention*"]
        assert settings["threshold"] == {"decode": 0.0001}
        assert config.calibration == ("*attention*", result)
        assert result.pending == ()
        assert isinstance(config, FlashSkipSoftmaxConfig)
        assert SparseAttentionConfig.model_validate_json(config.model_dump_json()).sparse_cfg == config.sparse_cfg

    def test_which_pattern_gets_it_must_be_clear(self):
        result = CalibrationConfig(prefill=PhaseCalibration(target=0.5, threshold=0.1))
        with pytest.raises(ConfigError, match="not clear"):
            SparseAttentionConfig(sparse_cfg={"a": {}, "b": {}}).calibrated(result)
        asked = SparseAttentionConfig(sparse_cfg={"a": {}, "b": {"calibration": {}}})
        assert asked.calibrated(result).calibration == ("b", result)

    def test_two_sources_of_one_lambda_are_refused(self):
        fitted = {"prefill": {"target": 0.5, "a": 1.0, "b": 1.0}}
        assert "both give prefill" in refused(threshold=0.1, calibration=fitted).fix
        settings = {"threshold": {"decode": 0.1}, "calibration": fitted}
        assert SparseAttentionConfig(sparse_cfg={"a": settings}).sparse_cfg["a"] == settings

    def test_per_layer_results_count(self):
        layer = {"prefill": {"target": 0.5, "threshold": 0.01}}
        calibration = CalibrationConfig.model_validate({"strategy": "balanced", "layers": {"model.layers.0": layer}})
        assert calibration.found == {"prefill"}
        assert calibration.layers["model.layers.0"].fitted["prefill"].threshold == 0.01


class TestCallableKeys:
    @pytest.mark.parametrize("key", [only_attention, Holder.nested])
    def test_written_by_name_and_read_back(self, key):
        config = SparseAttentionConfig(sparse_cfg={key: {"br": 64}})
        text = config.model_dump_json()
        assert list(json.loads(text)["sparse_cfg"]) == [f"{__name__}:{key.__qualname__}"]
        assert SparseAttentionConfig.model_validate_json(text) == config

    def test_refused_with_the_reason(self):
        def local(name: str) -> bool:
            return True

        class Callable:
            def __call__(self, name: str) -> bool:
                return True

        renamed = type("only_attention", (), {})
        renamed.__module__, renamed.__qualname__ = __name__, "only_attention"
        for key, reason in (
            (lambda name: True, "lambda"),
            (local, "inside a function"),
            (Callable(), "no name to import"),
            (renamed, "another object"),
        ):
            with pytest.raises(ConfigError) as caught:
                SparseAttentionConfig(sparse_cfg={key: {}}).model_dump_json()
            assert reason in caught.value.found

    @pytest.mark.parametrize("name", ["no_such_module_x:f", "os.path:no_such_name", "os.path:sep"])
    def test_names_that_cannot_be_loaded(self, name):
        with pytest.raises(ValidationError, match=r"cannot load|not callable"):
            SparseAttentionConfig(sparse_cfg={name: {}})

    def test_other_keys_are_refused(self):
        with pytest.raises(ValidationError, match="a string or a callable"):
            SparseAttentionConfig.model_validate({"sparse_cfg": {3: {}}})
