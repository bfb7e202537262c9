"""A sparsified, calibrated model survives being saved: weights, thresholds, unit, and what it computes, bit for bit."""

import json

import pytest
import torch
from calibration_models import CONFIG, peaky_llama, random_texts

from sparse_attention import layers_of, restore, sparsify, summary
from sparse_attention.calibrate import calibrate
from sparse_attention.checkpoint import CONFIGURATION, load_checkpoint, save_checkpoint
from sparse_attention.errors import ConfigError, MissingError, ModelError, UsageError
from sparse_attention.interchange import from_checkpoint_record
from sparse_attention.trial import forward

TARGETS = {"prefill": 0.3, "decode": 0.4}


@pytest.fixture(scope="module")
def model():
    return peaky_llama(layers=2)


@pytest.fixture(scope="module")
def calibrated(model):
    texts = random_texts(2, 256)
    return {
        strategy: calibrate(model, CONFIG, texts, targets=TARGETS, strategy=strategy, lengths=[256]).config
        for strategy in ("static", "length", "balanced")
    }


@pytest.mark.parametrize("strategy", ["static", "length", "balanced"])
@pytest.mark.parametrize("saved_sparse", [True, False])
def test_round_trip(model, calibrated, strategy, saved_sparse, tmp_path):
    config, text = calibrated[strategy], random_texts(1, 256, seed=8)[0]
    sparsify(model, config, unit="group")
    try:
        expected = forward(model, text).logits
        counts = [layer.counts for layer in summary(model)]
        if not saved_sparse:
            restore(model)
        save_checkpoint(model, config, tmp_path / "model", unit="group")
        assert bool(layers_of(model)) == saved_sparse  # left as it was
        if saved_sparse:
            assert torch.equal(forward(model, text).logits, expected)
    finally:
        restore(model)
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.config == config and loaded.unit == "group"
    assert torch.equal(forward(loaded.model, text).logits, expected)
    assert [layer.counts for layer in summary(loaded.model)] == counts
    assert sum(counts[0]["prefill"].skipped) > 0
    suffixes = {path.suffix for path in (tmp_path / "model").iterdir()}
    assert suffixes == {".safetensors", ".json"}  # nothing that would be unpickled


def test_any_tool_loads_it_densely(model, calibrated, tmp_path):
    from transformers import AutoModelForCausalLM

    save_checkpoint(model, calibrated["length"], tmp_path / "model")
    text = random_texts(1, 64)[0]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert not layers_of(dense)
    assert torch.equal(forward(dense, text).logits, forward(model, text).logits)
    assert not layers_of(load_checkpoint(tmp_path / "model", sparse=False).model)


def test_the_record_for_other_tools_lies_in_config_json(model, calibrated, tmp_path):
    assert any("64 x 128" in note for note in save_checkpoint(model, calibrated["length"], tmp_path / "model"))
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    found = from_checkpoint_record(content).config.calibration[1].fitted
    assert found == calibrated["length"].calibration[1].fitted
    notes = save_checkpoint(model, calibrated["static"], tmp_path / "static")
    assert any("no sparse_attention_config" in note for note in notes)
    assert "sparse_attention_config" not in json.loads((tmp_path / "static" / "config.json").read_text())


def test_bad_input(model, calibrated, tmp_path):
    target = tmp_path / "model"
    with pytest.raises(ModelError, match="Hugging Face"):
        save_checkpoint(torch.nn.Linear(2, 2), calibrated["length"], target)
    with pytest.raises(ConfigError, match="matches no attention"):
        save_checkpoint(model, {"sparse_cfg": {"*nothing*": {}}}, target)
    assert not target.exists()
    with pytest.raises(MissingError, match="not a saved sparse model"):
        load_checkpoint(tmp_path)
    save_checkpoint(model, calibrated["length"], target)
    with pytest.raises(UsageError, match="not empty"):
        save_checkpoint(model, calibrated["length"], target)
    content = json.loads((target / "config.json").read_text())
    content["block_skip_attention"]["format"] = 99
    (target / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="another version"):
        load_checkpoint(target)
    (target / CONFIGURATION).unlink()
    with pytest.raises(MissingError):
        load_checkpoint(target)
