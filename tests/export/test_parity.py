"""The proof itself: it passes on a model that skips tiles, and fails on a file that was tampered with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from rich.console import Console

from export import ParityReport, check
from export.compare import compare_layer
from export.finish import op_nodes
from export.parity import EndToEnd
from export.report import print_parity, verdict, write_json
from export.runners import NodeRunner
from export.tolerances import GAP_BAND, OUTPUT
from sparse_attention import layers_of, observed, sparsify
from sparse_attention.errors import CheckError, MissingError, ModelError, UsageError
from sparse_attention.layer import AttentionCall, AttentionLayer
from tests.conftest import Exported, tokens
from tests.sparse_attention.attention_models import settings, tiny

Export = Callable[..., Exported]
TOKENS = 70


def printed(report: ParityReport, width: int = 200) -> list[str]:
    text = io.StringIO()
    print_parity(Console(file=text, width=width), report)
    return [line for line in text.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("request_", "phases"),
    [({}, ["prefill"]), ({"family": "bert"}, ["prefill"]), ({"dtype": "float16"}, ["prefill"]),
     ({"dtype": "bfloat16"}, ["prefill"]), ({"family": "gemma2"}, ["prefill"]),
     ({"padding": "any", "unit": "group"}, ["prefill"]),
     ({"kv_cache": True, "tunable": True, "counts": True}, ["prefill", "decode"]),
     ({"static_cache": 64, "tunable": True}, ["prefill", "decode"])],
    ids=str,
)  # fmt: skip
def test_passes(request_: dict[str, Any], phases: list[str], exported: Export) -> None:
    file = exported(**request_)
    model = file.dense()
    report = check(file.path, model, tokens=48, name="tiny")
    dtype = str(file.dtype).removeprefix("torch.")
    assert report.passed and report.dtype == dtype and report.tokens == 48
    names = [layer.name for layer in layers_of(file.sparse())]
    assert [(layer.name, layer.phase) for layer in report.layers] == [(n, p) for p in phases for n in names]
    for layer in report.layers:
        assert layer.different == 0 and layer.error <= layer.tolerance == OUTPUT[dtype]
        assert layer.threshold == pytest.approx(0.7) and layer.gap_error < GAP_BAND[dtype] / 10
        assert 0 <= layer.skipped < layer.tiles
    assert report.skipped > 50 and not any("no tile" in note for note in report.notes)
    assert any("widened twin" in note for note in report.notes) == (dtype == "bfloat16")
    assert all(output.passed for output in report.outputs)
    assert all((output.tolerance is None) == (dtype != "float32") for output in report.outputs)
    assert layers_of(model) == []  # left as it was
    last = printed(report)[-1]
    assert last.startswith(f"PASSED {len(report.layers)} layers, {report.skipped} of {report.tiles} tiles skipped")


def test_a_narrow_terminal_cuts_no_figure_short(exported: Export) -> None:
    file = exported(kv_cache=True, tunable=True, counts=True)
    report = check(file.path, file.dense(), tokens=48, name="tiny")
    layers = tuple(replace(layer, name=f"language_{layer.name}", threshold=0.000123) for layer in report.layers)
    rows = [line for line in printed(replace(report, layers=layers), width=80) if "0.000123" in line]
    assert len(rows) == len(layers) == 4
    for row, layer in zip(rows, layers, strict=True):
        assert row.split()[-4:] == [str(layer.skipped), f"{100 * layer.skipped / layer.tiles:.1f}",
                                    f"{layer.error:.1e}", "0"]  # fmt: skip


def tampered(file: Exported, directory: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(file.path)
    change(model)
    onnx.save(model, directory / "model.onnx")
    return directory / "model.onnx"


def attribute(name: str, value: float | int, node: int = 1) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        of_ops = [one for one in model.graph.node if one.domain == "blockskip"]
        found = next(one for one in of_ops[node].attribute if one.name == name)
        if isinstance(value, float):
            found.f = value
        else:
            found.i = value

    return change


def weight(number: int) -> Callable[[onnx.ModelProto], None]:
    """One number of one of the matrices, which the file holds from the embedding (0) to the head (-1)."""

    def change(model: onnx.ModelProto) -> None:
        found = [one for one in model.graph.initializer if len(one.dims) == 2][number]
        array = onnx.numpy_helper.to_array(found).copy()
        array.flat[3] += 0.5
        found.CopyFrom(onnx.numpy_helper.from_array(array, found.name))

    return change


def body(op_type: str, replacement: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        nodes = [one for one in model.functions[0].node if one.op_type == op_type]
        nodes[-1].op_type = replacement

    return change


@pytest.mark.parametrize(
    ("name", "value"),
    [("prefill_threshold", 0.69), ("prefill_threshold", 0.0), ("decode_threshold", 0.1), ("br", 8), ("bc", 2),
     ("scale", 0.3), ("window", 5), ("is_causal", 0), ("softcap", 30.0)],
)  # fmt: skip
def test_a_changed_attribute_is_found(name: str, value: float, exported: Export, tmp_path: Path) -> None:
    """Even where the numbers happen to agree: the file must say what the model's configuration says."""
    path = tampered(exported(), tmp_path, attribute(name, value))
    with pytest.raises(CheckError, match=rf"layers\.1\.self_attn[\s\S]*{name} is") as raised:
        check(path, tiny("llama"), tokens=TOKENS)
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("number", [0, 1, 5, -1], ids=["embedding", "query", "feed_forward", "head"])
def test_a_changed_weight_is_found(number: int, exported: Export, tmp_path: Path) -> None:
    """The layers agree on their own q, k, v; the whole file does not."""
    path = tampered(exported(), tmp_path, weight(number))
    report = check(path, tiny("llama"), tokens=TOKENS)
    assert not report.passed and all(layer.passed for layer in report.layers)
    assert printed(report)[-1].startswith("FAILED 1 of 3: logits; ")


@pytest.mark.parametrize(
    ("op_type", "replacement"),
    [("Not", "Identity"), ("Softmax", "LogSoftmax"), ("LessOrEqual", "Less"), ("Sub", "Add")],
)
def test_a_changed_body_is_found(op_type: str, replacement: str, exported: Export, tmp_path: Path) -> None:
    path = tampered(exported(), tmp_path, body(op_type, replacement))
    report = check(path, tiny("llama"), tokens=TOKENS)
    assert not report.passed and not any(layer.passed for layer in report.layers)
    assert "model.layers.0.self_attn" in printed(report)[-1] and printed(report)[-1].startswith("FAILED")


def test_another_model_is_found(exported: Export) -> None:
    """Same shapes, other weights; other layers; another configuration."""
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    assert not check(exported().path, other, tokens=TOKENS).passed
    with pytest.raises(CheckError, match=r"different settings[\s\S]*prefill_threshold is 0\.69"):
        check(exported().path, sparsify(tiny("llama"), settings(0.3)), tokens=TOKENS)
    with pytest.raises((CheckError, ModelError, UsageError)):
        check(exported().path, tiny("bert"), tokens=TOKENS)


def test_a_check_that_skips_nothing_says_so(exported: Export) -> None:
    """One tile a row block: nothing could be skipped, so nothing is shown."""
    report = check(exported().path, tiny("llama"), tokens=3)
    assert report.passed and report.skipped == 0 and report.tiles > 0
    assert any(note.startswith("no tile was skipped, so nothing is shown about skipping") for note in report.notes)
    assert any("no tile was skipped" in line for line in printed(report))


def observed_call(file: Exported) -> tuple[AttentionLayer, AttentionCall, torch.Tensor, NodeRunner]:
    calls: list[tuple[AttentionLayer, AttentionCall, torch.Tensor]] = []
    model = file.sparse()
    with observed(model, lambda layer, call, out, counts: calls.append((layer, call, out))), torch.no_grad():
        model(tokens(1, TOKENS))
    graph = ir.load(file.path)
    return *calls[0], NodeRunner(graph, op_nodes(graph)[0])


class Altered:
    """The node, with something of its answer changed."""

    def __init__(self, node: NodeRunner, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        self.node, self.change = node, change

    def __call__(self, given: Any) -> dict[str, torch.Tensor]:
        found = {name: value.clone() for name, value in self.node(given).items()}
        self.change(found)
        return found


def test_one_decision_outside_the_band_fails(exported: Export) -> None:
    layer, call, out, node = observed_call(exported())
    assert compare_layer(layer, call, out, node).passed

    def flip(found: dict[str, torch.Tensor]) -> None:
        index = (found["tile_exists"] & ~found["tile_kept"]).nonzero()[3]
        found["tile_kept"][tuple(index)] = True

    result = compare_layer(layer, call, out, Altered(node, flip))  # type: ignore[arg-type]
    assert not result.passed and result.different == 1 and result.in_band == ()


def test_a_decision_inside_the_band_is_listed_and_not_an_error(exported: Export) -> None:
    """λ is put right beside the gap of one tile: the node, at the old λ, decides it otherwise, and may."""
    layer, call, _, node = observed_call(exported())
    gaps = node({"q": call.q, "k": call.k, "v": call.v})["tile_gap"]
    below = gaps[(gaps < np.log(0.7)) & torch.isfinite(gaps)]
    gap = float(below.max())
    moved = float(np.exp(gap - GAP_BAND["float32"] / 2))  # now this tile is kept
    near = replace(layer.settings, thresholds=type(layer.thresholds).of(moved))
    at_moved = replace(layer, settings=near)
    result = compare_layer(at_moved, call, at_moved.run(call), node)
    assert result.different == 0 and len(result.in_band) >= 1 and result.passed
    tile = result.in_band[0]
    assert abs(tile.gap - tile.log_threshold) <= GAP_BAND["float32"]
    assert json.dumps(result.as_dict())


def test_an_output_that_differs_fails(exported: Export) -> None:
    layer, call, out, node = observed_call(exported())

    def change(found: dict[str, torch.Tensor]) -> None:
        found["o"][0, 2, 40, 1] += 1e-3

    assert not compare_layer(layer, call, out, Altered(node, change)).passed  # type: ignore[arg-type]
    assert not compare_layer(layer, call, out + 1e-3, node).passed

    def spoil(found: dict[str, torch.Tensor]) -> None:
        found["o"][0, 2, 40, 1] = float("nan")

    assert not compare_layer(layer, call, out, Altered(node, spoil)).passed  # type: ignore[arg-type]


def test_nan_never_passes() -> None:
    assert not EndToEnd("logits", float("nan"), None, 1.0).passed
    assert not EndToEnd("logits", float("nan"), 1e-3, 1.0).passed
    assert not EndToEnd("logits", float("inf"), 1e-3, 1.0).passed
    assert EndToEnd("logits", 0.5, None, 1.0).passed and not EndToEnd("logits", 0.5, 1e-3, 1.0).passed


def test_report_as_table_and_json(exported: Export, tmp_path: Path) -> None:
    report = check(exported().path, tiny("llama"), tokens=TOKENS, name="tiny")
    lines = printed(report)
    for layer in report.layers:
        row = next(line for line in lines if layer.name in line)
        for value in ("0.7", str(layer.tiles), str(layer.skipped), f"{layer.error:.1e}"):
            assert value in row
    assert lines[-1] == verdict(report)
    write_json(tmp_path / "report.json", report.as_dict())
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["passed"] is True and told["skipped"] == report.skipped and told["tokens"] == TOKENS
    assert [one["name"] for one in told["layers"]] == [layer.name for layer in report.layers]
    assert told["outputs"][0]["output"] == "logits" and told["outputs"][0]["passed"] is True
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_files_that_cannot_be_checked(exported: Export, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file"):
        check(tmp_path / "none.onnx", tiny("llama"))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not protobuf at all" * 9)
    with pytest.raises(ModelError, match=r"cannot be read as ONNX|no block-skip attention"):
        check(broken, tiny("llama"))
    plain = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.save(plain, broken)
    with pytest.raises(ModelError, match="no block-skip attention"):
        check(broken, tiny("llama"))

    def other_version(model: onnx.ModelProto) -> None:
        next(one for one in model.opset_import if one.domain == "blockskip").version = 2

    with pytest.raises(ModelError, match=r"unknown version of the op[\s\S]*blockskip 2"):
        check(tampered(exported(), tmp_path, other_version), tiny("llama"))
    with pytest.raises(UsageError, match=r"longer than the model's positions[\s\S]*--tokens 256"):
        check(exported().path, tiny("llama"), tokens=257)
