"""How an engine's outputs are judged against the model's, and what a machine without TensorRT is told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from tensorrt_support import ROOT, run_process

from export.engine.check import COUNTS_ERROR, compare
from export.engine.inputs import example_inputs
from export.engine.model import TensorInfo


def test_close_and_far() -> None:
    expected = np.linspace(-4, 4, 100, dtype=np.float16).reshape(10, 10)
    found = torch.from_numpy(expected.copy())
    assert compare("prefill", "o", found, torch.from_numpy(expected)).error == 0
    found[3, 3] += 0.5
    check = compare("prefill", "o", found, torch.from_numpy(expected))
    assert not check.passed
    assert check.error == pytest.approx(0.5 / 4, rel=1e-2)


def test_nan_only_matches_nan() -> None:
    expected = np.ones((2, 2), np.float32)
    found = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    assert not compare("prefill", "o", found, torch.from_numpy(expected)).passed
    expected[0, 1] = np.nan
    assert compare("prefill", "o", found, torch.from_numpy(expected)).passed


def test_another_shape_is_infinitely_far() -> None:
    assert compare("prefill", "o", torch.ones(2, 3), torch.ones(3, 2)).error == float("inf")


def test_tile_counts() -> None:
    expected = np.array([[[10, 100], [50, 100]]], np.int32)
    found = torch.from_numpy(expected.copy())
    assert compare("prefill", "tile_counts", found, torch.from_numpy(expected)).error == 0
    found[0, 0, 0] += 2  # of 200 tiles
    assert compare("prefill", "tile_counts", found, torch.from_numpy(expected)).error == pytest.approx(0.01)
    found[0, 0, 0] += int(200 * COUNTS_ERROR)
    assert not compare("prefill", "tile_counts", found, torch.from_numpy(expected)).passed
    found[0, 0, 1] += 1  # how many tiles exist is no matter of rounding
    assert compare("prefill", "tile_counts", found, torch.from_numpy(expected)).error == float("inf")


def test_other_integers_are_equal_or_not() -> None:
    assert compare("prefill", "ids", torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])).error == 1


def test_examples_fit_what_the_names_say() -> None:
    tensors = [
        TensorInfo("input_ids", TensorProto.INT64, ("batch", "sequence")),
        TensorInfo("attention_mask", TensorProto.INT64, ("batch", "total")),
        TensorInfo("position_ids", TensorProto.INT64, ("batch", "sequence")),
        TensorInfo("past_key_values.0.key", TensorProto.FLOAT16, ("batch", 3, "past", 64)),
        TensorInfo("threshold_scale", TensorProto.FLOAT, (1,)),
    ]
    shapes = {"input_ids": (1, 4), "attention_mask": (1, 6), "position_ids": (1, 4), "threshold_scale": (1,)}
    found = example_inputs(tensors, {**shapes, "past_key_values.0.key": (1, 3, 2, 64)})
    assert len(np.unique(found["input_ids"])) > 1
    assert found["attention_mask"].all()
    assert found["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert found["past_key_values.0.key"].dtype == np.float16
    assert found["threshold_scale"].tolist() == [1.0]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_the_script_for_users_says_what_is_missing(plugin_library: Path) -> None:
    script = ROOT / "plugins/tensorrt/verify.py"
    result = run_process([sys.executable, script], BLOCKSKIP_TENSORRT_PLUGIN=str(plugin_library))
    assert result.returncode == 3, result.stderr
    assert "TensorRT is not installed" in result.stdout
    assert "--runtime tensorrt-rtx" in result.stdout
