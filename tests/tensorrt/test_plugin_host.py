"""The plugin walked as TensorRT does, without TensorRT: every input of the contract, every bad one refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto
from tensorrt_models import attention_model
from tensorrt_support import ROOT, load_write_plan, run_process

PROFILES = (
    "--profile", "prefill:batch=1/1/2,past=0,sequence=2/200/300",
    "--profile", "decode:batch=1/2/3,past=1/130/400,sequence=1",
)  # fmt: skip


def write_plan(model: Path, folder: Path) -> Path:
    plan: Path = load_write_plan().plan_for(model, folder, PROFILES[1::2], inputs={}, data=False)[1]
    return plan


def test_the_script_writes_data_for_a_gpu(tmp_path: Path) -> None:
    model = attention_model(tmp_path / "model.onnx")
    script = ROOT / "plugins/host/write_plan.py"
    result = run_process([sys.executable, script, model, tmp_path / "plan", *PROFILES, "--data"])
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["nodes"] == 1
    assert (tmp_path / "plan" / "layer0.prefill.q.bin").stat().st_size == 1 * 4 * 200 * 64 * 2
    assert "data k layer0.decode.k.bin" in (tmp_path / "plan" / "plan.txt").read_text()


def walk(host: Path, library: Path, plan: Path) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    result = run_process([host, library, plan])
    return result, [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    "inputs",
    [
        ("q", "k", "v"),
        ("q", "k", "v", "bias"),
        ("q", "k", "v", "threshold_scale"),
        ("q", "k", "v", "kv_lengths", "q_start", "q_lengths"),
    ],
    ids=",".join,
)
@pytest.mark.parametrize("counts", [False, True], ids=["o", "o,counts"])
def test_every_step_of_every_profile(
    host: Path, plugin_library: Path, tmp_path: Path, inputs: tuple[str, ...], counts: bool
) -> None:
    model = attention_model(tmp_path / "model.onnx", inputs=inputs, counts=counts, layers=2)
    result, answers = walk(host, plugin_library, write_plan(model, tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [(a["node"], a["profile"]) for a in answers] == [
        (f"layer{layer}", profile) for layer in range(2) for profile in ("prefill", "decode")
    ]
    # exactly one format per type: TensorRT has nothing to choose wrongly
    assert {a["combinations"] for a in answers} == {1}


def test_boolean_mask_reaches_the_plugin_as_an_additive_one(host: Path, plugin_library: Path, tmp_path: Path) -> None:
    model = attention_model(tmp_path / "model.onnx", inputs=("q", "k", "v", "bias"), bool_bias=True)
    plan = write_plan(model, tmp_path)
    assert "input bias half" in plan.read_text()
    result, _ = walk(host, plugin_library, plan)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("attribute br int 128", "attribute br int 77", "77 x 128"),
        ("attribute bc int 128", "attribute bc int 64", "128 x 64"),
        ("attribute scale float 0.125", "", '"scale": found nothing'),
        ("attribute scale float 0.125", "attribute scale float -1", '"scale"'),
        ("attribute scale float 0.125", "attribute scale int 1", '"scale": found field type'),
        ("attribute unit string head", "attribute unit string row", '"unit": found "row"'),
        ("attribute inputs string q,k,v", "attribute inputs string q,v,k", '"k" is unknown, repeated or out of order'),
        ("attribute inputs string q,k,v", "attribute inputs string q,k", "required input"),
        ("attribute inputs string q,k,v", "attribute inputs string q,k,v,sinks", "names 4"),
        ("attribute window int 0", "attribute window int -5", '"window"'),
        ("input k half min 1,2", "input k half min 1,3", "divides the 4 heads"),
        ("attribute outputs string o", "attribute outputs string counts", '"outputs"'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    host: Path, plugin_library: Path, tmp_path: Path, before: str, after: str, reason: str
) -> None:
    plan = write_plan(attention_model(tmp_path / "model.onnx"), tmp_path)
    text = plan.read_text()
    assert before in text
    changed = text.replace(before, after)
    if "input k" in before:  # all three shapes of k and v
        changed = text.replace(",2,", ",3,")
    plan.write_text(changed)
    result, answers = walk(host, plugin_library, plan)
    assert result.returncode == 1
    assert answers[-1]["failed"] == "layer0"
    assert reason in result.stderr + result.stdout


def test_float32_has_no_format(host: Path, plugin_library: Path, tmp_path: Path) -> None:
    plan = write_plan(attention_model(tmp_path / "model.onnx"), tmp_path)
    plan.write_text(plan.read_text().replace(" half ", " float "))
    result, answers = walk(host, plugin_library, plan)
    assert result.returncode == 1
    assert "0 combinations" in answers[-1]["reason"]


def test_bfloat16_walks(host: Path, plugin_library: Path, tmp_path: Path) -> None:
    plan = write_plan(attention_model(tmp_path / "model.onnx", dtype=TensorProto.FLOAT16), tmp_path)
    plan.write_text(plan.read_text().replace(" half ", " bf16 "))  # ONNX Runtime's CPU cannot run it in bfloat16
    result, _ = walk(host, plugin_library, plan)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_library_that_is_no_plugin(host: Path, tmp_path: Path) -> None:
    plan = write_plan(attention_model(tmp_path / "model.onnx"), tmp_path)
    result, answers = walk(host, Path("libm.so.6"), plan)
    assert result.returncode == 1
    assert "setLoggerFinder" in answers[-1]["reason"]
