"""Whether an engine computes what the model does: outputs, tile counts, latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.engine.against import Against, against_onnx
from export.engine.load import load_engine
from export.engine.run import EngineRunner
from sparse_attention.errors import MissingError, UsageError

RELATIVE_ERROR = {torch.float32: 2e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Allowed |difference| over the largest |value| of an output, by the output's dtype. Not measured on TensorRT yet.
Between PyTorch and ONNX Runtime on a CPU in float16, SmolLM2 on 448 tokens and a decode step is 7.5e-3 apart at most,
and 1 of its 2700 tiles is decided otherwise. The small Llama of tests/tensorrt/test_engine_against.py is 7e-4 apart in
its decode step, all tiles decided alike, and 2.03e-2 in its prefill, where on one CPU 1 of 1368 is not.

In half precision one tile decided otherwise changes all that follows, so this tells a broken engine from a working one;
whether each layer is right is judged layer by layer (by a check of the .onnx, and by the plugin's host on a GPU).
"""

COUNTS_ERROR = 0.02
"""Allowed difference of skipped tiles over existing tiles, for the same reason; existing tiles have to be equal."""


@dataclass(frozen=True)
class OutputCheck:
    """One output at one profile; `error` is the largest difference over the largest value, for tile counts the share of
    the tiles that were decided otherwise, for other integers the number of entries that differ.

    `tiles` of tile counts are those that the engine skipped, those that were to be skipped, and those that exist.
    """

    profile: str
    output: str
    error: float
    allowed: float
    tiles: tuple[int, int, int] | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return vars(self) | {"passed": self.passed}


@dataclass(frozen=True)
class EngineCheck:
    """All outputs at all profiles, and the latency of a run per profile in milliseconds; `notes` are for people."""

    outputs: tuple[OutputCheck, ...]
    milliseconds: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.outputs) and all(check.passed for check in self.outputs)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        outputs = [one.as_dict() for one in self.outputs]
        times = dict(self.milliseconds)
        return {"passed": self.passed, "outputs": outputs, "milliseconds": times, "notes": list(self.notes)}


def check_engine(path: Path, against: Path | Against, *, plugin: Path | None = None) -> EngineCheck:
    """Runs the engine on the inputs of each case of `against` and compares every output of it.

    Args:
        path: an engine with its record beside it.
        against: an exported `.onnx`, run by ONNX Runtime on examples, or what `against_onnx` or `against_model` made.
        plugin: the plugin library, where it is not in its place.

    Raises:
        MissingError: where the engine cannot be loaded or run here.
        UsageError: where the two do not belong together.
    """
    loaded = load_engine(path, plugin=plugin)
    checks: list[OutputCheck] = []
    milliseconds: dict[str, float] = {}
    for case in (against_onnx(against) if isinstance(against, Path) else against)(loaded.sidecar):
        try:
            runner = EngineRunner(loaded, case.profile)
            found = runner(case.inputs)
            milliseconds[case.profile] = runner.milliseconds(case.inputs)
        except torch.OutOfMemoryError as error:
            raise MissingError(
                "There is not enough memory on the GPU to run the engine.", where=f"profile {case.profile}",
                found=str(error).splitlines()[0], fix="Free the GPU, or give fewer --tokens.",
            ) from error  # fmt: skip
        missing = [name for name in found if name not in case.expected]
        if missing:
            raise UsageError(
                "The engine has an output that the model does not have.", where=str(path), found=", ".join(missing[:5]),
                fix=f"Compare it with the model it was made from; the one given has {', '.join(case.expected)}.",
            )  # fmt: skip
        checks += [compare(case.profile, name, found[name], case.expected[name]) for name in found]
    return EngineCheck(tuple(checks), milliseconds, _notes(checks, list(loaded.sidecar.profiles)))


def _notes(checks: list[OutputCheck], profiles: list[str]) -> tuple[str, ...]:
    counted = [check.tiles for check in checks if check.tiles is not None]
    notes = [f"profile {name} was not run" for name in profiles if name not in {check.profile for check in checks}]
    if not counted:
        notes.append("the engine counts no tiles, so they were not compared: export with --counts")
    elif not any(skipped for skipped, _, _ in counted):
        notes.append("no tile was skipped, so nothing is shown about skipping: take a longer input or a larger λ")
    return tuple(notes)


def compare(profile: str, name: str, found: Tensor, expected: Tensor) -> OutputCheck:
    """One output; a wrong shape, or a NaN on one side only, counts as infinitely far."""
    found, expected = found.cpu(), expected.cpu()
    if found.shape != expected.shape:
        return OutputCheck(profile, name, float("inf"), 0.0)
    if found.dtype == torch.int32 and found.shape[-1:] == (2,) and name.endswith("counts"):
        return _compare_counts(profile, name, found.long(), expected.long())
    if not found.dtype.is_floating_point:
        return OutputCheck(profile, name, float((found != expected).sum()), 0.0)
    if not found.numel():
        return OutputCheck(profile, name, 0.0, 0.0)
    actual, wanted = found.float(), expected.float()
    both_nan = actual.isnan() & wanted.isnan()
    difference = (actual - wanted).abs().masked_fill(both_nan, 0.0).nan_to_num(nan=float("inf"))
    largest = wanted.abs().nan_to_num().amax().clamp(min=1e-6)
    return OutputCheck(profile, name, float(difference.amax() / largest), RELATIVE_ERROR[found.dtype])


def _compare_counts(profile: str, name: str, found: Tensor, expected: Tensor) -> OutputCheck:
    total = expected[..., 1].sum().clamp(min=1)
    error = float((found[..., 0] - expected[..., 0]).abs().sum() / total)
    if not torch.equal(found[..., 1], expected[..., 1]):
        error = float("inf")
    tiles = (int(found[..., 0].sum()), int(expected[..., 0].sum()), int(total))
    return OutputCheck(profile, name, error, COUNTS_ERROR, tiles)
