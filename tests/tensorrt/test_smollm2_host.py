"""Every node of an exported SmolLM2-135M goes through the plugin as TensorRT takes it, at prefill and decode shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from emulation import Emulation
from filelock import FileLock
from tensorrt_support import enqueue_emulated, load_host_script, load_write_plan, run_process

from export.engine.model import read_model
from export.engine.shapes import make_profiles, parse_shapes
from export.models import load_model
from export.pipeline import ExportOptions, export_onnx
from export.samples import token_ids

TEXT = 300
"""Tokens: three by three tiles, of which six exist."""
LAYERS, HEADS, KV_HEADS, SIZE = 30, 9, 3, 64
PROFILES = (
    "prefill:batch=1,sequence=2/128/200,past=0,total=2/128/200",
    "decode:batch=1,sequence=1,past=1/128/199,total=2/129/200",
)


@pytest.fixture(scope="session")
def with_cache(smollm2: Path, shared_folder: Path) -> Path:
    """The exported model, float16 with a cache, counts and a tunable threshold; beside it the tokens of a text."""
    path = shared_folder / "smollm2" / "model.onnx"
    with FileLock(shared_folder / "smollm2.lock"):
        if not path.exists():
            loaded = load_model(str(smollm2), dtype="float16")
            path.parent.mkdir()
            np.save(path.with_suffix(".npy"), token_ids(loaded.tokenizer, TEXT, 0).numpy())
            options = ExportOptions(kv_cache=True, counts=True, tunable=True)
            export_onnx(loaded.model, "skip_softmax_demo", path, options=options)
    return path


@pytest.mark.model
def test_every_node_at_prefill_and_decode(host: Path, plugin_library: Path, with_cache: Path, tmp_path: Path) -> None:
    _, plan, _ = load_write_plan().plan_for(with_cache, tmp_path, PROFILES, inputs={}, data=False)
    result = run_process([host, plugin_library, plan])
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-1000:]
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == 2 * LAYERS
    assert len({answer["node"] for answer in answers}) == LAYERS
    assert {answer["combinations"] for answer in answers} == {1}
    text = plan.read_text()
    assert f"input q half min 1,{HEADS},2,{SIZE} opt 1,{HEADS},128,{SIZE}" in text
    assert f"input k half min 1,{KV_HEADS},2,{SIZE} opt 1,{KV_HEADS},129,{SIZE}" in text, "K and V are not expanded"
    assert f"output counts int32 min {HEADS},2" in text


@pytest.mark.model
def test_every_layer_computes_what_pytorch_does(
    emulation: Emulation, plugin_build: Path, with_cache: Path, tmp_path: Path
) -> None:
    """Each layer's own q, k, v of a real text, through the plugin, the kernels' source run on an emulated GPU."""
    ids = np.load(with_cache.with_suffix(".npy"))
    profile = f"prefill:batch=1,sequence={TEXT},past=0,total={TEXT}"
    _, plan, _ = load_write_plan().plan_for(with_cache, tmp_path, [profile], inputs={"input_ids": ids}, data=True)
    script = load_host_script("compare")
    results = []
    for case in script.read_cases(plan):
        inputs = [case.read(tmp_path, name) for name in case.tensors if name not in case.outputs]
        o, counts = (torch.full(s, -1, dtype=t) for t, s in (case.tensors[name] for name in case.outputs))
        enqueue_emulated(emulation, plugin_build, plan, case.node, case.profile, inputs, [o, counts])
        for name, output in zip(case.outputs, (o, counts), strict=True):
            (tmp_path / f"{case.node}.{case.profile}.{name}.bin").write_bytes(output.numpy().tobytes())
        results.append(script.compare(tmp_path, case, "cpu"))
    assert len(results) == LAYERS
    assert [r.case.node for r in results if not r.passed] == []
    assert sum(r.found[0] for r in results) > 0, "a text that skips nothing tests nothing"


@pytest.mark.model
def test_default_profiles_fit_it(with_cache: Path) -> None:
    model = read_model(with_cache)
    assert model.recorded["config"]["sparse_cfg"]
    prefill, decode = make_profiles(model.inputs, parse_shapes(["sequence:1,512,2048"]))
    assert prefill.inputs["input_ids"] == ((1, 1), (1, 512), (1, 2048))
    assert decode.inputs["input_ids"] == ((1, 1), (1, 1), (1, 1))
    assert decode.inputs["past_key_values.0.key"][2] == (1, KV_HEADS, 2047, SIZE)
