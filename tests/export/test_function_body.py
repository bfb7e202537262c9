"""The op in standard operators: every feature, node by node, in ONNX Runtime and in onnx's own evaluator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from export.finish import finish, op_nodes
from export.runners import NodeRunner
from export.tolerances import GAP_BAND, OUTPUT
from sparse_attention import Thresholds, reference
from tests.attention_calls import Call, calls, int32, peaky_call
from tests.onnx_graphs import CUDA, RUNTIMES, feeds, finished, graph_of, run

ROWS, COLUMNS = 37, 61
_RANDOM = torch.Generator().manual_seed(5)


def _open(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=_RANDOM) < 0.8


def _added(*shape: int) -> torch.Tensor:
    """Additive, with hidden keys in both spellings."""
    value = torch.randn(*shape, generator=_RANDOM).masked_fill(~_open(*shape), -math.inf)
    return value.masked_fill(~_open(*shape), torch.finfo(torch.float32).min)


CALIBRATED = {"prefill": {"a": 2.0, "b": 3.0, "target": 0.5}, "decode": {"a": 1.0, "b": 4.0, "target": 0.5}}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal_upper_left": {"is_causal": True, "q_start": int32(0, 0)},
    "window": {"is_causal": True, "window": 13},
    "window_without_causality": {"window": 13},
    "softcap": {"softcap": 4.0},
    "additive": {"bias": _added(2, 4, ROWS, COLUMNS)},
    "additive_per_key": {"bias": _added(2, 1, 1, COLUMNS), "is_causal": True},
    "mask": {"bias": _open(2, 1, ROWS, COLUMNS)},
    "mask_per_head": {"bias": _open(1, 4, 1, COLUMNS)},
    "kv_lengths": {"kv_lengths": int32(61, 20)},
    "lengths": {"kv_lengths": int32(50, 3), "q_lengths": int32(37, 1), "q_start": int32(13, 2), "is_causal": True},
    "nothing_visible": {"kv_lengths": int32(0, 61), "q_lengths": int32(37, 0), "sinks": torch.zeros(4)},
    "sinks": {"sinks": torch.tensor([-1.0, 0.0, 4.0, -math.inf])},
    "scaled": {"threshold_scale": torch.tensor([0.3])},
    "unusable_scale": {"threshold_scale": torch.tensor([math.nan])},
    "group": {"unit": "group"},
    "group_causal_mask": {"unit": "group", "is_causal": True, "bias": _open(1, 4, ROWS, COLUMNS)},
    "sizes": {"size": 12, "v_size": 7, "heads": 6, "kv_heads": 3},
    "multi_query": {"kv_heads": 1},
    "tall_tiles": {"br": 16, "bc": 4},
    "wide_tiles": {"br": 3, "bc": 20},
    "one_tile": {"br": 128, "bc": 128},
}
DENSE = {
    ("unusable_scale", ROWS), ("unusable_scale", 1), ("one_tile", ROWS), ("one_tile", 1), ("nothing_visible", ROWS),
    ("causal_upper_left", 1),
}  # fmt: skip
"""Where nothing can be skipped, which is what these are about."""

# onnx's evaluator computes -inf - -inf and log 0 as the body says, and NumPy warns of both
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def call_of(feature: str, rows: int = ROWS) -> Call:
    more = {"batch": 2, "br": 8, "bc": 8, "threshold": 0.3, "sharpness": 0.6} | FEATURES[feature]
    if rows == 1:
        more |= {"bias": more["bias"][:, :, :1]} if "bias" in more else {}
        more |= {"q_lengths": int32(1, 1)} if "q_lengths" in more else {}
    call = peaky_call(rows, COLUMNS, **more)
    return call


def tolerance(call: Call) -> float:
    dtype = str(call.tensors["q"].dtype).removeprefix("torch.")
    return OUTPUT[dtype] * float(call.tensors["v"].float().abs().max())


def near_band(call: Call, tiles: reference.TileDecisions) -> bool:
    rows, columns, batch = call.tensors["q"].shape[2], call.tensors["k"].shape[2], call.tensors["q"].shape[0]
    lengths = call.tensors.get("kv_lengths", torch.full((batch,), columns))
    threshold = Thresholds.of(call.thresholds).phase(rows)
    lam = reference.effective_threshold(threshold, lengths, call.tensors.get("threshold_scale"))
    return bool(((tiles.gap - torch.log(lam).view(-1, 1, 1, 1)).abs() < GAP_BAND["float32"]).any())


def assert_like_reference(call: Call, found: dict[str, torch.Tensor], number: int = 0) -> int:
    """Outputs and counts of one node; returns the tiles skipped."""
    expected, tiles = reference.attention(*call.qkv, **call.keywords())
    assert found[f"{number}.o"].dtype == call.tensors["q"].dtype
    if near_band(call, tiles):
        return 0
    assert (found[f"{number}.o"].float() - expected).abs().max() <= tolerance(call)
    if "tile_counts" in found:
        assert torch.equal(found["tile_counts"][number], tiles.counts)
    return int(tiles.counts[:, 0].sum())


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("rows", [ROWS, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, rows: int, dtype: torch.dtype, runtime: str) -> None:
    call = call_of(feature, rows).to(dtype)
    found = run(finished([call], counts=True), feeds([call]), runtime)
    skipped = assert_like_reference(call, found)
    assert (skipped > 0) == ((feature, rows) not in DENSE)


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not torch.cuda.is_available(),
    reason="needs a GPU and onnxruntime-gpu",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("rows", [ROWS, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features_on_cuda(feature: str, rows: int, dtype: torch.dtype) -> None:
    call = call_of(feature, rows).to(dtype)
    skipped = assert_like_reference(call, run(finished([call], counts=True), feeds([call]), CUDA))
    assert (skipped > 0) == ((feature, rows) not in DENSE)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("rows", [ROWS, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("lengths", [None, int32(61, 12)], ids=["whole", "lengths"])
def test_calibrated(rows: int, lengths: torch.Tensor | None, runtime: str) -> None:
    """λ follows the length of each batch element; 12 keys are so few that λ would pass 1: dense."""
    call = call_of("plain", rows)
    tensors = call.tensors | ({} if lengths is None else {"kv_lengths": lengths})
    call = Call(tensors, call.options, {"prefill": CALIBRATED["prefill"], "decode": CALIBRATED["decode"]})
    assert assert_like_reference(call, run(finished([call], counts=True), feeds([call]), runtime)) > 0


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_any_call(call: Call) -> None:
    """Every combination of features, in ONNX Runtime."""
    assert_like_reference(call, run(finished([call], counts=True), feeds([call]), "onnxruntime"))


@pytest.mark.parametrize("opset", [18, 21, 23, 24])
def test_opsets(opset: int) -> None:
    call = call_of("lengths")
    model = finished([call], opset=opset, counts=True)
    onnx.checker.check_model(model, full_check=True)
    assert {one.version for one in model.functions[0].opset_import} == {opset}
    assert assert_like_reference(call, run(model, feeds([call]), "onnx.reference")) > 0


def node_runner(call: Call) -> NodeRunner:
    model = finish(graph_of([call]))
    return NodeRunner(model, op_nodes(model)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("feature", ["causal", "additive", "mask", "group", "sinks", "lengths", "window", "softcap"])
def test_decisions_of_a_single_node(feature: str, dtype: torch.dtype) -> None:
    """Gap, existence and decision of every tile; bfloat16 runs as its widened twin."""
    call = call_of(feature).to(dtype)
    runner = node_runner(call)
    assert runner.widened == (dtype == torch.bfloat16)
    found = runner(call.tensors)
    expected, tiles = reference.attention(*call.qkv, **call.keywords())
    assert not near_band(call, tiles)
    assert torch.equal(found["tile_kept"], tiles.kept) and torch.equal(found["tile_exists"], tiles.exists)
    finite = torch.isfinite(tiles.gap)
    assert torch.equal(torch.isfinite(found["tile_gap"]), finite)
    assert (found["tile_gap"] - tiles.gap)[finite].abs().max() < 1e-5
    assert (found["o"].float() - expected).abs().max() <= tolerance(call)
    assert tiles.counts[:, 0].sum() > 0


def test_bfloat16_passes_the_checker() -> None:
    call = call_of("additive").to(torch.bfloat16)
    model = finished([call], counts=True)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_zero_is_dense_bit_for_bit() -> None:
    """λ = 0 against a scale of 0 on a λ that skips: the same bits."""
    call = call_of("causal")
    scaled = Call(call.tensors | {"threshold_scale": torch.ones(1)}, call.options, call.thresholds)
    model, feed = finished([scaled], counts=True), feeds([scaled])
    sparse = run(model, feed, "onnxruntime")
    off = run(model, feed | {"0.threshold_scale": np.zeros(1, np.float32)}, "onnxruntime")
    zero = call.with_threshold(0.0)
    dense = run(finished([zero], counts=True), feeds([zero]), "onnxruntime")
    assert torch.equal(off["0.o"], dense["0.o"]) and not torch.equal(sparse["0.o"], dense["0.o"])
    assert not off["tile_counts"][..., 0].any() and sparse["tile_counts"][..., 0].any()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_equality_keeps_the_tile(runtime: str) -> None:
    """A gap of exactly ln λ is kept, one of 1e-6 less is not."""
    at = float(torch.log(torch.tensor(0.5)))
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([0.0, at, at - 1e-6]).view(1, 1, 3, 1)
    call = Call({"q": q, "k": k, "v": k}, {"br": 1, "bc": 1, "scale": 1.0}).with_threshold(0.5)
    found = run(finished([call], counts=True), feeds([call]), runtime)
    assert found["tile_counts"].flatten().tolist() == [1, 3]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_anything_may_lie_beyond_the_lengths(runtime: str) -> None:
    call = call_of("kv_lengths")
    expected = run(finished([call]), feeds([call]), runtime)["0.o"]
    for name in ("k", "v"):
        for b, length in enumerate((61, 20)):
            call.tensors[name][b, :, length:] = math.nan
    assert torch.equal(run(finished([call]), feeds([call]), runtime)["0.o"], expected)


def test_nan_in_v_of_a_kept_tile_reaches_the_output() -> None:
    call = call_of("plain")
    call.tensors["v"][:, :, 2] = math.nan
    assert not torch.isfinite(run(finished([call]), feeds([call]), "onnxruntime")["0.o"]).any()


def test_nan_in_a_score_stays_in_its_row_block() -> None:
    call = call_of("plain")
    model = finished([call])
    expected = run(model, feeds([call]), "onnxruntime")["0.o"]
    call.tensors["q"][:, :, 11] = math.nan
    out = run(model, feeds([call]), "onnxruntime")["0.o"]
    others = [i for i in range(ROWS) if i // 8 != 1]
    assert torch.equal(out[:, :, others], expected[:, :, others])


def test_one_graph_serves_every_shape() -> None:
    """Batch, rows and columns of the graph are open; the last tiles are ragged in each of these."""
    model = finished([peaky_call(5, 9, is_causal=True, br=8, bc=8, threshold=0.3, sharpness=0.6)], counts=True)
    skipped = 0
    for rows, columns in ((1, 1), (1, 129), (113, 203), (64, 64), (7, 64)):
        call = peaky_call(rows, columns, batch=3, is_causal=True, br=8, bc=8, threshold=0.3, sharpness=0.6)
        skipped += assert_like_reference(call, run(model, feeds([call]), "onnxruntime"))
    assert skipped > 0


def test_body_without_features_is_small() -> None:
    """What no node of the model uses costs nothing."""
    plain = [node.op_type for node in finished([call_of("plain")]).functions[0].node]
    for feature, added in (("window", "LessOrEqual"), ("softcap", "Tanh"), ("sinks", "Concat"), ("lengths", "Less")):
        more = [node.op_type for node in finished([call_of(feature)]).functions[0].node]
        assert more.count(added) > plain.count(added) and len(more) > len(plain)
