"""Whether an engine computes what the model does: outputs, tile counts, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from export.engine.inputs import example_inputs
from export.engine.load import load_engine
from export.engine.model import read_model
from export.engine.run import EngineRunner
from export.engine.sidecar import Sidecar
from sparse_attention.errors import UsageError

Arrays = Mapping[str, np.ndarray]
Reference = Callable[[Arrays], Arrays]
"""Runs the model the engine is compared with: inputs by name to outputs by name."""

RELATIVE_ERROR = {torch.float32: 2e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Allowed |difference| over the largest |value| of an output, by the output's dtype. Not measured on TensorRT yet.

In half precision one tile decided otherwise changes all that follows, so this tells a broken engine from a working one;
whether each layer is right is judged layer by layer (by a check of the .onnx, and by the plugin's host on a GPU).
"""

COUNTS_ERROR = 0.02
"""Allowed difference of skipped tiles over existing tiles, for the same reason; existing tiles have to be equal."""


@dataclass(frozen=True)
class OutputCheck:
    """One output at one profile; `error` is the largest difference over the largest value, for tile counts the share of
    the tiles that were decided otherwise, for other integers the number of entries that differ."""

    profile: str
    output: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class EngineCheck:
    """All outputs at all profiles, and the latency of a run per profile in milliseconds."""

    outputs: tuple[OutputCheck, ...]
    milliseconds: Mapping[str, float]

    @property
    def passed(self) -> bool:
        return bool(self.outputs) and all(check.passed for check in self.outputs)


def check_engine(
    path: Path, against: Path | Reference, inputs: Mapping[str, Arrays] | None = None, *, plugin: Path | None = None
) -> EngineCheck:
    """Runs the engine and what it is compared with on the same inputs, given per profile.

    `against` is an exported `.onnx`, run by ONNX Runtime, or anything callable. Without `inputs` an `.onnx` is run on
    examples at the best shapes of every profile. Raises MissingError where the engine cannot run here, UsageError where
    inputs are needed or the two have no output in common.
    """
    loaded = load_engine(path, plugin=plugin)
    if inputs is None:
        inputs = _inputs_of(path, loaded.sidecar, against)
    reference = against if callable(against) else onnx_reference(against)
    checks: list[OutputCheck] = []
    milliseconds: dict[str, float] = {}
    for profile, arrays in inputs.items():
        runner = EngineRunner(loaded, profile)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)).cuda() for name, value in arrays.items()}
        found = runner(tensors)
        expected = reference(arrays)
        common = [name for name in found if name in expected]
        if not common:
            raise UsageError(
                "The engine and the model have no output in common.", where=str(path), found=f"{list(found)}",
                fix=f"Compare it with the model it was built from, which has {list(expected)}.",
            )  # fmt: skip
        checks += [compare(profile, name, found[name], expected[name]) for name in common]
        milliseconds[profile] = runner.milliseconds(tensors)
    return EngineCheck(tuple(checks), milliseconds)


def _inputs_of(path: Path, sidecar: Sidecar, against: Path | Reference) -> dict[str, Arrays]:
    if callable(against):
        raise UsageError(
            "A function says nothing of its inputs.", where=str(path), fix="Give the inputs, by profile and name."
        )
    tensors = read_model(against).inputs
    return {
        profile: example_inputs(tensors, {name: shapes[1] for name, shapes in recorded.items()})
        for profile, recorded in sidecar.profiles.items()
    }


def compare(profile: str, name: str, found: torch.Tensor, expected: np.ndarray) -> OutputCheck:
    """One output; a wrong shape, or a NaN on one side only, counts as infinitely far."""
    reference = torch.from_numpy(np.ascontiguousarray(expected))
    if found.shape != reference.shape:
        return OutputCheck(profile, name, float("inf"), 0.0)
    if found.dtype == torch.int32 and found.shape[-1:] == (2,) and name.endswith("counts"):
        return OutputCheck(profile, name, _counts_error(found.cpu().long(), reference.long()), COUNTS_ERROR)
    if not found.dtype.is_floating_point:
        return OutputCheck(profile, name, float((found.cpu() != reference).sum()), 0.0)
    actual, wanted = found.cpu().float(), reference.float()
    both_nan = actual.isnan() & wanted.isnan()
    difference = (actual - wanted).abs().masked_fill(both_nan, 0.0).nan_to_num(nan=float("inf"))
    largest = wanted.abs().nan_to_num().amax().clamp(min=1e-6)
    return OutputCheck(profile, name, float(difference.amax() / largest), RELATIVE_ERROR[found.dtype])


def _counts_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    if not torch.equal(found[..., 1], expected[..., 1]):
        return float("inf")
    different = (found[..., 0] - expected[..., 0]).abs().sum()
    return float(different / expected[..., 1].sum().clamp(min=1))


def onnx_reference(path: Path) -> Reference:
    """The exported model in ONNX Runtime, by its function body."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run
