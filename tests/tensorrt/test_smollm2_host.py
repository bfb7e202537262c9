"""Every node of an exported SmolLM2-135M goes through the plugin as TensorRT takes it, at prefill and decode shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorrt_support import load_write_plan, run_process

from export.engine.model import read_model
from export.engine.shapes import make_profiles, parse_shapes
from export.models import load_model
from export.pipeline import ExportOptions, export_onnx
from export.smollm2 import fetch_smollm2
from sparse_attention.errors import MissingError

LAYERS, HEADS, KV_HEADS, SIZE = 30, 9, 3, 64
PROFILES = (
    "prefill:batch=1,sequence=2/128/200,past=0,total=2/128/200",
    "decode:batch=1,sequence=1,past=1/128/199,total=2/129/200",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        weights = fetch_smollm2()
    except MissingError as error:
        pytest.skip(str(error))
    path = Path(tmp_path_factory.mktemp("smollm2")) / "smollm2.onnx"
    model = load_model(str(weights), dtype="float16").model
    export_onnx(model, "skip_softmax_demo", path, options=ExportOptions(kv_cache=True, counts=True, tunable=True))
    return path


@pytest.mark.model
def test_every_node_at_prefill_and_decode(host: Path, plugin_library: Path, smollm2: Path, tmp_path: Path) -> None:
    _, plan, _ = load_write_plan().plan_for(smollm2, tmp_path, PROFILES, inputs={}, data=False)
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
def test_default_profiles_fit_it(smollm2: Path) -> None:
    model = read_model(smollm2)
    assert model.configuration["sparse_cfg"]
    prefill, decode = make_profiles(model.inputs, parse_shapes(["sequence:1,512,2048"]))
    assert prefill.inputs["input_ids"] == ((1, 1), (1, 512), (1, 2048))
    assert decode.inputs["input_ids"] == ((1, 1), (1, 1), (1, 1))
    assert decode.inputs["past_key_values.0.key"][2] == (1, KV_HEADS, 2047, SIZE)
