"""Compares what the host computed on a GPU with PyTorch, layer by layer.

    python plugins/host/write_plan.py out.onnx FOLDER --profile ... --data
    build/blockskip_plugin_host build/libblockskip_tensorrt.so FOLDER/plan.txt --run FOLDER
    python plugins/host/compare.py FOLDER

Every node's own q, k, v (and further inputs) from the plan go through the float32 definition; its output and its tile
counts are compared with those that the plugin wrote. A tile may be decided otherwise only where its gap lies within the
band of ln λ; such layers are listed. Exit code 0: all within bounds, 1: not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from export.tolerances import GAP_BAND, OUTPUT
from sparse_attention.reference import TileDecisions, attention, effective_threshold
from sparse_attention.threshold import Thresholds

TYPES = {
    "float": torch.float32, "half": torch.float16, "bf16": torch.bfloat16, "int32": torch.int32, "bool": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One profile of one node: its attributes, and type and best shape of each tensor."""

    node: str
    profile: str
    attributes: Mapping[str, Any]
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    outputs: tuple[str, ...]

    def read(self, folder: Path, name: str) -> Tensor:
        """A tensor of the plan, or one that the host wrote."""
        dtype, shape = self.tensors[name]
        data = bytearray((folder / f"{self.node}.{self.profile}.{name}.bin").read_bytes())
        return torch.frombuffer(data, dtype=dtype).reshape(shape)


@dataclass(frozen=True)
class Result:
    """`error` is relative to the largest |v|; `in_band` counts tiles so close to ln λ that either decision is right."""

    case: Case
    error: float
    allowed: float
    found: tuple[int, int]
    expected: tuple[int, int]
    in_band: int

    @property
    def passed(self) -> bool:
        skipped = abs(self.found[0] - self.expected[0]) <= self.in_band
        # Another decision about a tile in the band moves the output by more than rounding: then counts judge alone.
        close = self.error <= self.allowed or (self.found != self.expected and skipped)
        return self.found[1] == self.expected[1] and skipped and close


def read_cases(plan: Path) -> Iterator[Case]:
    """The profiles of the plan that have data."""
    node, attributes, profile = "", dict[str, Any](), ""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    outputs: list[str] = []
    has_data = False
    readers = {"int": int, "float": float, "string": str}
    for line in [*plan.read_text().splitlines(), "node end"]:
        kind, *words = line.split(" ")
        if kind in ("node", "profile") and has_data:
            yield Case(node, profile, dict(attributes), dict(tensors), tuple(outputs))
        if kind == "node":
            node, attributes, has_data = words[0], {}, False
        elif kind == "profile":
            profile, tensors, outputs, has_data = words[0], {}, [], False
        elif kind == "attribute":
            attributes[words[0]] = readers[words[1]](words[2] if len(words) > 2 else "")
        elif kind in ("input", "output"):
            tensors[words[0]] = (TYPES[words[1]], tuple(map(int, words[5].split(","))))
            outputs += [words[0]] if kind == "output" else []
        elif kind == "data":
            has_data = True


def compare(folder: Path, case: Case, device: str) -> Result:
    """Runs the definition on the case's inputs and judges what the host wrote."""
    names = [name for name in case.tensors if name not in case.outputs]
    given: dict[str, Any] = {name: case.read(folder, name).to(device) for name in names}
    has = case.attributes
    thresholds = Thresholds.from_attributes(has)
    settings: dict[str, Any] = {name: has[name] for name in ("br", "bc", "scale", "softcap", "window", "unit")}
    expected, tiles = attention(**given, threshold=thresholds, is_causal=bool(has["is_causal"]), **settings)
    out = case.read(folder, "o").to(device)
    error = float((out.float() - expected).abs().nan_to_num(nan=float("inf")).amax() / given["v"].float().abs().amax())
    counted = case.read(folder, "counts").sum(0).tolist() if "counts" in case.outputs else None
    wanted = tiles.counts.sum(0).tolist()
    return Result(
        case, error, OUTPUT[str(out.dtype).removeprefix("torch.")], tuple(counted or wanted), tuple(wanted),
        tiles_in_band(given, thresholds, tiles),
    )  # fmt: skip


def tiles_in_band(given: Mapping[str, Tensor], thresholds: Thresholds, tiles: TileDecisions) -> int:
    """Tiles whose gap lies so close to ln λ that rounding may decide them."""
    q, k = given["q"], given["k"]
    lengths = given.get("kv_lengths", torch.full((k.shape[0],), k.shape[2], device=k.device))
    lam = effective_threshold(thresholds.phase(q.shape[2]), lengths, given.get("threshold_scale"))
    distance = (tiles.gap - torch.log(lam).view(-1, 1, 1, 1)).abs()
    return int((tiles.exists & (distance <= GAP_BAND[str(q.dtype).removeprefix("torch.")])).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    results = [compare(folder, case, device) for case in read_cases(folder / "plan.txt")]
    table = Table("node", "profile", "error / max|v|", "allowed", "tiles skipped", "of", "in band", "")
    for result in results:
        table.add_row(
            result.case.node, result.case.profile, f"{result.error:.1e}", f"{result.allowed:.1e}",
            f"{result.found[0]} ({result.expected[0]})", str(result.found[1]), str(result.in_band),
            "PASSED" if result.passed else "FAILED",
        )  # fmt: skip
    Console(width=160).print(table)
    skipped = sum(result.found[0] for result in results)
    passed = bool(results) and all(result.passed for result in results) and skipped > 0
    print(f"{len(results)} comparisons, {skipped} tiles skipped, device {device}")
    print("PASSED" if passed else "FAILED: nothing was skipped" if results and not skipped else "FAILED")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
