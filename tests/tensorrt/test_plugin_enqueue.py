"""The whole plugin with enqueue, without a GPU: the kernels' own source runs over the emulated driver.

From a node of an exported file over creator, plan, context and shapes to output and tile counts, compared with the
definition. Streams, graphs and time need a GPU: `plugins/host` runs the same walk there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation import Emulation
from planted import THRESHOLD, planted
from tensorrt_models import attention_model
from tensorrt_support import enqueue_emulated, load_host_script, load_write_plan
from torch import Tensor

from export import op
from sparse_attention.reference import attention

HEADS, KV_HEADS, SIZE = 4, 2, 64
TOLERANCE = 3e-3
"""Absolute, float16 outputs of magnitude up to 4: that of the kernels' own tests."""
Enqueue = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def enqueue(emulation: Emulation, plugin_build: Path, tmp_path: Path) -> Enqueue:
    """Runs one node of an exported model by the plugin; returns o and counts, both poisoned before."""

    def run(tensors: Mapping[str, Tensor], **attributes: Any) -> tuple[Tensor, Tensor]:
        q, k = tensors["q"], tensors["k"]
        inputs = op.input_names(list(tensors))
        model = attention_model(tmp_path / "m.onnx", inputs=inputs, counts=True, **attributes)
        past = k.shape[2] - q.shape[2]
        profile = f"only:batch={q.shape[0]},sequence={q.shape[2]},past={past}"
        _, plan, _ = load_write_plan().plan_for(model, tmp_path, [profile], inputs={}, data=True)
        o = torch.full((*q.shape[:3], tensors["v"].shape[3]), float("nan"), dtype=q.dtype)
        counts = torch.full((HEADS, 2), -1, dtype=torch.int32)
        given = [tensors[name] for name in inputs]
        enqueue_emulated(emulation, plugin_build, plan, "layer0", "only", given, [o, counts])
        return o, counts

    return run


def inputs_of(batch: int, rows: int, columns: int) -> dict[str, Tensor]:
    q, k, v = planted(batch, HEADS, KV_HEADS, rows, columns, SIZE, dtype=torch.float16, device="cpu")
    return {"q": q, "k": k, "v": v}


def check(enqueue: Enqueue, tensors: dict[str, Tensor], threshold: float, **options: Any) -> Tensor:
    """Output and counts against the definition; returns the counts."""
    attributes = {"prefill_threshold": threshold, "decode_threshold": threshold, "is_causal": 1, "scale": SIZE**-0.5}
    o, counts = enqueue(tensors, **attributes | options)
    scale = tensors.get("threshold_scale")
    expected, tiles = attention(
        **tensors, threshold=threshold, br=options.get("br", 128), is_causal=bool(options.get("is_causal", 1)),
        scale=SIZE**-0.5, softcap=options.get("softcap", 0.0), window=options.get("window", 0),
    )  # fmt: skip
    assert counts.tolist() == tiles.counts.tolist(), f"threshold_scale {scale}"
    assert (o.float() - expected).abs().max() <= TOLERANCE
    return counts


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 129), (113, 203), (300, 520)])
@pytest.mark.parametrize("br", [64, 128])
def test_prefill_and_decode(enqueue: Enqueue, rows: int, columns: int, br: int) -> None:
    counts = check(enqueue, inputs_of(1, rows, columns), THRESHOLD, br=br)
    if columns == 520:
        assert counts[:, 0].sum() > 0, "inputs that skip nothing test nothing"


def test_dense(enqueue: Enqueue) -> None:
    assert check(enqueue, inputs_of(1, 200, 300), 0.0)[:, 0].sum() == 0


def test_lengths_and_starts(enqueue: Enqueue) -> None:
    tensors = inputs_of(2, 200, 420)
    tensors["kv_lengths"] = torch.tensor([420, 301], dtype=torch.int32)
    tensors["q_start"] = torch.tensor([220, 101], dtype=torch.int32)
    tensors["q_lengths"] = torch.tensor([200, 77], dtype=torch.int32)
    assert check(enqueue, tensors, THRESHOLD)[:, 0].sum() > 0


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_one_engine_tuned_at_run_time(enqueue: Enqueue, scale: float) -> None:
    tensors = inputs_of(1, 300, 520)
    tensors["threshold_scale"] = torch.tensor([scale])
    counts = check(enqueue, tensors, THRESHOLD)
    assert (counts[:, 0].sum() > 0) == (scale > 0)


def test_additive_bias_is_broadcast(enqueue: Enqueue) -> None:
    tensors = inputs_of(1, 200, 420)
    bias = torch.zeros(1, 1, 200, 420, dtype=torch.float16)
    bias[..., 50:90] = torch.finfo(torch.float16).min
    tensors["bias"] = bias
    check(enqueue, tensors, THRESHOLD, is_causal=0)


def test_window_and_softcap(enqueue: Enqueue) -> None:
    check(enqueue, inputs_of(1, 200, 420), THRESHOLD, window=150, softcap=20.0)


@pytest.mark.parametrize("rows", [1, 200])
def test_sinks_join_the_denominator(enqueue: Enqueue, rows: int) -> None:
    tensors = inputs_of(1, rows, 420)
    options = {"threshold": THRESHOLD, "is_causal": True, "scale": SIZE**-0.5}
    without, _ = attention(**tensors, **options)  # type: ignore[arg-type]
    tensors["sinks"] = torch.tensor([20.0, 12.0, 0.0, float("-inf")], dtype=torch.float16)
    expected, _ = attention(**tensors, **options)  # type: ignore[arg-type]
    assert (without - expected).abs().max() > 10 * TOLERANCE
    check(enqueue, tensors, THRESHOLD)


def test_calibrated_threshold_follows_the_length(enqueue: Enqueue) -> None:
    tensors = inputs_of(1, 300, 520)
    curve = {"prefill_a": 2.0, "prefill_b": 3.0, "prefill_target": 0.5}
    _, counts = enqueue(tensors, is_causal=1, scale=SIZE**-0.5, **curve)
    threshold = {"prefill": {"a": 2.0, "b": 3.0, "target": 0.5}}
    _, tiles = attention(**tensors, threshold=threshold, is_causal=True, scale=SIZE**-0.5)
    assert counts.tolist() == tiles.counts.tolist()
    assert counts[:, 0].sum() > 0


def test_the_comparison_with_pytorch_passes_and_can_fail(enqueue: Enqueue, tmp_path: Path) -> None:
    """What is run after a walk on a GPU, on outputs of the emulation."""
    script = load_host_script("compare")
    tensors = inputs_of(1, 300, 520)
    o, counts = enqueue(tensors, is_causal=1, scale=SIZE**-0.5, prefill_threshold=THRESHOLD)
    files = {**tensors, "o": o, "counts": counts}
    for name, tensor in files.items():
        (tmp_path / f"layer0.only.{name}.bin").write_bytes(tensor.contiguous().numpy().tobytes())
    (case,) = script.read_cases(tmp_path / "plan.txt")
    result = script.compare(tmp_path, case, "cpu")
    assert result.passed
    assert result.found[0] > 0

    def judged(name: str, changed: Tensor) -> bool:
        (tmp_path / f"layer0.only.{name}.bin").write_bytes(changed.numpy().tobytes())
        passed: bool = script.compare(tmp_path, case, "cpu").passed
        (tmp_path / f"layer0.only.{name}.bin").write_bytes(files[name].contiguous().numpy().tobytes())
        return passed

    wrong, poisoned, miscounted = o.clone(), o.clone(), counts.clone()
    wrong[0, 1, 7] += 0.1
    poisoned[0, 0, 0, 0] = float("nan")
    miscounted[0, 0] += 1
    assert not judged("o", wrong)
    assert not judged("o", poisoned)
    assert not judged("counts", miscounted)
