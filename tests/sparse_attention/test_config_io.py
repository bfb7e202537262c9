"""Files, presets, overrides: what goes out comes back, and every mistake has a place."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention.config import FlashSkipSoftmaxConfig, SparseAttentionConfig
from sparse_attention.config_io import json_schema, load_config, save_config
from sparse_attention.errors import ConfigError, MissingError, SparseAttentionError, UsageError
from sparse_attention.presets import PRESETS

SUFFIXES = ("yaml", "yml", "toml", "json")


def settings(source, *overrides, pattern="*attention*"):
    return load_config(source, overrides).sparse_cfg[pattern]


@pytest.fixture
def written(tmp_path):
    def write(name: str, text: str):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("c.yaml", 'sparse_cfg:\n  "*attention*": {threshold: {prefill: 1e-3}, br: 64}\nexport_format: onnx\n'),
            ("c.YML", '{sparse_cfg: {"*attention*": {threshold: {prefill: .1e-2}, br: 64}}, export_format: onnx}'),
            ("c.toml", 'export_format = "onnx"\n[sparse_cfg."*attention*"]\nthreshold.prefill = 1e-3\nbr = 64\n'),
            ("c.json", '{"sparse_cfg": {"*attention*": {"threshold": {"prefill": 1e-3}, "br": 64}},'
                       ' "export_format": "onnx"}'),
            ("bom.json", '\ufeff{"sparse_cfg": {"*attention*": {"threshold": {"prefill": 1e-3}, "br": 64}},'
                         ' "export_format": "onnx"}'),
        ],
    )  # fmt: skip
    def test_one_configuration_in_every_format(self, written, name, text):
        config = load_config(written(name, text))
        assert config.sparse_cfg == {"*attention*": {"threshold": {"prefill": 0.001}, "br": 64}}
        assert config.export_format == "onnx"
        assert load_config(str(written(name, text))) == config

    @pytest.mark.parametrize(
        ("name", "text", "where", "says"),
        [
            ("s.yaml", "sparse_cfg: [1\nb: 2", "s.yaml, line 2, column 2", "valid YAML"),
            ("t.yaml", "a:\n\tb: 1", "t.yaml, line 2, column 1", "valid YAML"),
            ("d.yaml", "sparse_cfg:\n  a: {br: 1}\n  a: {br: 2}", "d.yaml, line 3, column 3", '"a" is given twice'),
            ("u.yaml", 'a: !!python/object/apply:os.system ["true"]', "u.yaml, line 1, column 4", "remove the tag"),
            ("m.yaml", "a: 1\n---\nb: 2", "m.yaml, line 2, column 1", "valid YAML"),
            ("z.yaml", "a: \x00", "z.yaml", "valid YAML"),
            ("d.json", '{"a": 1, "a": 2}', "d.json", '"a" is given twice'),
            ("s.json", '{"sparse_cfg": }', "s.json, line 1, column 16", "valid JSON"),
            ("s.toml", "a = 1\nb = \n", "s.toml", "line 2"),
            ("d.toml", "a = 1\na = 2\n", "d.toml", "line 2"),
            ("deep.json", "[" * 100_000, "deep.json", "too deeply"),
            ("deep.yaml", "[" * 20_000, "deep.yaml", "too deeply"),
            ("e.yaml", "", "e.yaml", "is empty"),
            ("c.yaml", "# a comment\n", "c.yaml", "is empty"),
            ("e.json", " \n", "e.json", "is empty"),
            ("e.toml", "", "e.toml", "is empty"),
            ("l.yaml", "- 1", "l.yaml", "list"),
            ("x.txt", "a: 1", "x.txt", ".yaml, .yml, .toml, .json"),
            ("v.yaml", "sparse_cfg:\n  x: {threshold: .nan}", 'v.yaml: sparse_cfg["x"].threshold', "[0, 1)"),
            ("k.yaml", "sparse_cfgs: {}", "k.yaml: sparse_cfgs", 'did you mean "sparse_cfg"?'),
        ],
    )
    def test_mistakes_have_a_place(self, written, name, text, where, says):
        with pytest.raises(ConfigError) as caught:
            load_config(written(name, text))
        assert caught.value.where.endswith(where)
        assert says in str(caught.value)

    def test_files_that_cannot_be_read(self, tmp_path):
        with pytest.raises(MissingError) as caught:
            load_config(tmp_path / "no.yaml")
        assert caught.value.exit_code == 3
        (tmp_path / "dir.yaml").mkdir()
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
        for name in ("dir.yaml", "binary.yaml", "."):
            with pytest.raises(ConfigError):
                load_config(tmp_path / name)

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_presets_survive_files(self, tmp_path, preset, suffix):
        config = load_config(preset)
        again = load_config(save_config(config, tmp_path / f"c.{suffix}"))
        assert json.loads(again.model_dump_json()) == json.loads(config.model_dump_json())
        assert list(tmp_path.iterdir()) == [tmp_path / f"c.{suffix}"]

    @given(
        pattern=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
            lambda text: ":" not in text
        ),
        prefill=st.floats(0, 1, exclude_max=True),
        a=st.floats(1e-9, 1e9),
        observed=st.recursive(
            st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "y z", "0"]), inner),
            max_leaves=5,
        ),
    )  # fmt: skip
    def test_any_configuration_survives_any_format(self, tmp_path_factory, pattern, prefill, a, observed):
        calibration = {"decode": {"target": 0.5, "a": a, "b": 1.0, "observed": {"range": observed}}}
        config = SparseAttentionConfig(
            sparse_cfg={pattern: {"threshold": {"prefill": prefill}, "calibration": calibration}}
        )
        folder = tmp_path_factory.mktemp("any")
        for suffix in SUFFIXES:
            assert load_config(save_config(config, folder / f"c.{suffix}")) == config

    def test_saving_refuses_what_it_cannot_do(self, tmp_path):
        config = FlashSkipSoftmaxConfig()
        path = save_config(config, tmp_path / "c.yaml")
        with pytest.raises(UsageError, match="exists"):
            save_config(config, path)
        save_config(load_config("dense"), path, overwrite=True)
        assert settings(path)["threshold"] == 0.0
        for bad in (tmp_path / "c.ini", tmp_path / "no" / "c.yaml", path / "c.yaml"):
            with pytest.raises(ConfigError):
                save_config(config, bad)
        with pytest.raises(ConfigError, match="cannot be written"):
            save_config(SparseAttentionConfig(sparse_cfg={lambda name: True: {}}), tmp_path / "l.yaml")
        nulls = {"prefill": {"target": 0.5, "observed": {"x": [None]}}}
        with pytest.raises(ConfigError, match="TOML"):
            save_config(SparseAttentionConfig(sparse_cfg={"x": {"calibration": nulls}}), tmp_path / "n.toml")
        assert list(tmp_path.iterdir()) == [path]


class TestSources:
    def test_presets_by_name_in_any_case(self):
        assert load_config("skip_softmax_default") == FlashSkipSoftmaxConfig()
        assert load_config("SKIP_SOFTMAX_DEFAULT") == FlashSkipSoftmaxConfig()
        calibration = load_config("SKIP_SOFTMAX_CALIB").calibration
        assert calibration is not None and calibration[1].pending == ("prefill", "decode")

    def test_presets_are_copies(self):
        load_config("dense").sparse_cfg["*attention*"]["br"] = 1
        assert settings("dense")["br"] == 128

    def test_an_unknown_preset_is_answered_with_the_nearest(self):
        with pytest.raises(ConfigError) as caught:
            load_config("skip_softmx_default")
        assert 'did you mean "skip_softmax_default"' in caught.value.fix

    def test_dicts_and_objects(self):
        config = SparseAttentionConfig()
        assert load_config(config) is config
        assert load_config(json.loads(config.model_dump_json())) == config
        with pytest.raises(ConfigError) as caught:
            load_config({"sparse_cfg": {"x": {"br": 0}}})
        assert caught.value.where == 'sparse_cfg["x"].br'


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "threshold"),
        [
            ("threshold=0.1", 0.1),
            ("threshold = 1e-1", 0.1),
            ("thresholds=[0.1]", 0.1),
            ("threshold={prefill: 0.1}", {"prefill": 0.1}),
            ("threshold.prefill=0.1", {"decode": 0.0001, "prefill": 0.1}),
            ("thresholds.prefill=[0.1]", {"decode": 0.0001, "prefill": 0.1}),
            ("sparse_cfg.*attention*.threshold=0.1", 0.1),
            ("sparse_cfg.*attention*.threshold.prefill=0.1", {"decode": 0.0001, "prefill": 0.1}),
            ('sparse_cfg."*attention*".threshold.prefill=0.1', {"decode": 0.0001, "prefill": 0.1}),
            ("sparse_cfg['*attention*'].threshold.prefill=0.1", {"decode": 0.0001, "prefill": 0.1}),
            ('sparse_cfg["*attention*"].threshold.prefill=0.1', {"decode": 0.0001, "prefill": 0.1}),
        ],
    )
    def test_spellings(self, override, threshold):
        assert settings("skip_softmax_default", override)["threshold"] == threshold

    def test_one_phase_leaves_the_other_as_it_was(self):
        assert settings({}, "threshold.prefill=0.1")["threshold"] == {"prefill": 0.1, "decode": 0.001}
        assert settings("skip_softmax_demo", "threshold.decode=0")["threshold"] == {"prefill": 0.1, "decode": 0.0}
        source = {"sparse_cfg": {"*attention*": {"threshold": 0.1}, "*0*": {"br": 64}}}
        assert settings(source, "sparse_cfg.*0*.threshold.prefill=0.2", pattern="*0*")["threshold"] == {"prefill": 0.2}

    def test_every_pattern_but_default(self):
        source = {"sparse_cfg": {"a": {}, "b": {"br": 1}, "default": {"enable": False}}}
        config = load_config(source, ["br=64", "export_format=onnx"])
        assert config.sparse_cfg == {"a": {"br": 64}, "b": {"br": 64}, "default": {"enable": False}}
        assert config.export_format == "onnx"
        assert load_config(config, ["export_format=null"]).export_format is None

    @pytest.mark.parametrize(
        ("override", "pattern", "expected"),
        [
            ("sparse_cfg.model.layers.0.*.enable=false", "model.layers.0.*", {"enable": False}),
            ('sparse_cfg["*.threshold.*"].bc=32', "*.threshold.*", {"bc": 32}),
            ("sparse_cfg.*[01].self_attn.br=64", "*[01].self_attn", {"br": 64}),
            ("sparse_cfg.default.enable=true", "default", {"enable": True}),
        ],
    )
    def test_patterns_with_dots_and_new_ones(self, override, pattern, expected):
        assert settings("dense", override, pattern=pattern) == expected

    def test_calibration_goes_to_the_pattern_that_carries_it(self):
        source = {
            "sparse_cfg": {"a": {"br": 1}, "b": {"calibration": {"layers": {"m.0": {"prefill": {"target": 0.5}}}}}}
        }
        config = load_config(source, ['calibration.layers."m.0".prefill.target=0.3', "calibration.strategy=balanced"])
        assert config.sparse_cfg["a"] == {"br": 1}
        assert config.sparse_cfg["b"]["calibration"] == {
            "layers": {"m.0": {"prefill": {"target": 0.3}}},
            "strategy": "balanced",
        }

    def test_the_source_is_not_changed(self):
        config = load_config("skip_softmax_default")
        load_config(config, ["threshold.prefill=0.5"])
        assert config == FlashSkipSoftmaxConfig()

    @pytest.mark.parametrize(
        ("override", "kind", "says"),
        [
            ("threshold", UsageError, "key=value"),
            ("br=", UsageError, "without a value"),
            ("treshold=0.1", UsageError, 'did you mean "threshold"?'),
            ("sparse_cfg.*attention*.thresh=0.1", UsageError, 'did you mean "threshold"?'),
            ("export_fromat=onnx", UsageError, 'did you mean "export_format"?'),
            ("threshold.prefil=0.1", ConfigError, 'did you mean "prefill"?'),
            ("threshold=1", ConfigError, "[0, 1)"),
            ("br=0", ConfigError, "greater than or equal to 1"),
            ("br.x=1", ConfigError, "integer"),
            ("br=[1", ConfigError, "valid YAML"),
            ("br=!!python/name:os.system", ConfigError, "remove the tag"),
        ],
    )
    def test_mistakes(self, override, kind, says):
        with pytest.raises(SparseAttentionError) as caught:
            load_config("dense", [override])
        assert type(caught.value) is kind and says in str(caught.value)
        assert override.partition("=")[0] in caught.value.where

    def test_nothing_to_set_it_on(self):
        with pytest.raises(UsageError, match="no pattern"):
            load_config({"sparse_cfg": {"default": {}}}, ["br=1"])

    def test_a_calibrated_threshold_is_not_overridden_in_silence(self):
        fitted = {"sparse_cfg": {"a": {"calibration": {"prefill": {"target": 0.5, "a": 1.0, "b": 1.0}}}}}
        with pytest.raises(ConfigError, match="both give prefill"):
            load_config(fitted, ["threshold=0.1"])
        retargeted = load_config(fitted, ["calibration.prefill.target=0.2"])
        assert retargeted.calibration is not None and retargeted.calibration[1].prefill.target == 0.2


def test_json_schema_describes_the_file():
    schema = json_schema()
    attributes = schema["$defs"]["SparseAttentionAttributeConfig"]["properties"]
    assert schema["properties"]["export_format"]["anyOf"][0]["enum"] == ["onnx", "tensorrt"]
    assert attributes["br"]["minimum"] == 1 and attributes["backend"]["enum"] == ["pytorch", "cuda"]
    assert all(field["description"] for field in attributes.values())
    number, phases = attributes["threshold"]["oneOf"]
    assert number["exclusiveMaximum"] == 1 and phases["type"] == "object"
    assert json.dumps(schema)


def test_yaml_floats_do_not_touch_the_global_loader():
    assert yaml.safe_load("1e-3") == "1e-3"
