"""How fast the decode kernels are, beside cuDNN and FlashAttention-3, on inputs whose skipped tiles are counted.

Everything that is compared runs in turns in the same rounds, each as a CUDA graph of several calls: a decode step takes
tens of microseconds, so that otherwise the time of Python would be measured.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sparse_attention import native
from sparse_attention.errors import MissingError

__all__ = ["DecodeCase", "DecodeResult", "bench_decode", "default_cases", "format_table", "write_json"]

COLUMNS = 128
THRESHOLD = 1e-3
"""λ that lies several units from every planted tile's score gap."""
CALLS = 10
"""Calls in a graph."""


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """One query row against a cache; `keep` is the share of key tiles planted to be kept (None: nothing to skip)."""

    batch: int
    length: int
    keep: float | None = None
    size: int = 128
    heads: int = 32
    kv_heads: int = 8


@dataclass(slots=True)
class DecodeResult:
    """Median microseconds of a call by name, and the share of tiles that the kernels counted as skipped, by unit."""

    case: DecodeCase
    skipped: dict[str, float]
    microseconds: dict[str, float] = field(default_factory=dict)

    def terabytes_per_second(self, name: str) -> float:
        """K and V as if all were read."""
        c = self.case
        return 4 * c.batch * c.kv_heads * c.length * c.size / self.microseconds[name] / 1e6

    def share_of_bound(self, name: str) -> float:
        """Speed-up over the own dense time, as a share of `2 / (1 + kept)`: K always, V of the tiles that are kept."""
        dense, _, splits = name.partition(" / ")
        base = self.microseconds[f"dense / {splits}" if splits else "dense"]
        return base / self.microseconds[name] * (2 - self.skipped[dense.removeprefix("skip ")]) / 2


def default_cases(quick: bool = False) -> list[DecodeCase]:
    """The shapes of the README's table; `quick` takes only the first."""
    shapes = [(1, 32768)] if quick else [(1, 32768), (16, 8192), (16, 32768)]
    return [DecodeCase(batch, length, keep) for batch, length in shapes for keep in (None, 0.5, 0.2)]


def plant(case: DecodeCase, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q `[B, Hq, 1, D]`, k, v `[B, Hk, S, D] bfloat16`: keys of wanted tiles lie along the queries' direction."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(heads: int, rows: int) -> Tensor:
        shape = (case.batch, heads, rows, case.size)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    q, k, v = normal(case.heads, 1), normal(case.kv_heads, case.length), normal(case.kv_heads, case.length)
    if case.keep is None:
        return q, k, v
    direction = torch.zeros(case.size, device="cuda", dtype=torch.bfloat16)
    direction[::2] = 1 / math.sqrt(case.size / 2)
    q += 8 * direction
    wanted = (
        torch.rand(case.batch, case.kv_heads, case.length // COLUMNS, device="cuda", generator=generator) < case.keep
    )
    wanted[:, :, 0] = True
    k += (wanted.repeat_interleave(COLUMNS, 2)[..., None] * (14 * math.sqrt(case.size) / 8) * direction).to(k.dtype)
    return q, k, v


def _ours(
    q: Tensor, k: Tensor, v: Tensor, threshold: float, unit: str, splits: int
) -> tuple[Callable[[], object], Tensor]:
    library = native.load_library()
    out = torch.empty_like(q)
    counts = torch.empty(q.shape[1], 2, dtype=torch.int32, device="cuda")
    call = native.pack(
        q, k, v, out, counts=counts, threshold=threshold, unit=unit, br=1, scale=q.shape[3] ** -0.5, kv_splits=splits
    )
    call = call.with_workspace(torch.empty(library.workspace_size(call), dtype=torch.uint8, device="cuda"))
    return lambda: library.launch(call, torch.cuda.current_stream().cuda_stream), counts


def _contestants(
    case: DecodeCase, splits: tuple[int, ...]
) -> tuple[dict[str, Callable[[], object]], dict[str, Tensor]]:
    q, k, v = plant(case)
    runs: dict[str, Callable[[], object]] = {}
    with contextlib.suppress(ImportError, AttributeError):
        with_cache = importlib.import_module("fa3_fwd_interface").flash_attn_with_kvcache
        q2, k2, v2 = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        lengths = torch.full((case.batch,), case.length, dtype=torch.int32, device="cuda")
        runs["fa3"] = lambda: with_cache(q2, k2, v2, cache_seqlens=lengths)

    def cudnn() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=case.heads != case.kv_heads)

    runs["cudnn"] = cudnn
    counts = {}
    for number in splits:
        suffix = f" / {number}" if number else ""
        runs[f"dense{suffix}"], _ = _ours(q, k, v, 0.0, "head", number)
        for unit in ("head", "group"):
            runs[f"skip {unit}{suffix}"], counts[unit] = _ours(q, k, v, THRESHOLD, unit, number)
    return runs, counts


def _capture(run: Callable[[], object]) -> Callable[[], object]:
    """A graph of CALLS calls."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph.replay


def _race(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of a call of each, over rounds in which all take their turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


def bench_decode(
    cases: list[DecodeCase] | None = None,
    *,
    rounds: int = 5,
    splits: tuple[int, ...] = (0,),
    report: Callable[[DecodeResult], None] | None = None,
) -> list[DecodeResult]:
    """Times every case; `report` is called with each result as soon as it is there.

    `splits` are numbers of programs that share the keys of a head, each timed on its own; 0 lets the library choose.

    Raises:
        MissingError: no GPU, or no kernel library.
    """
    if not torch.cuda.is_available():
        raise MissingError("the kernels can only be timed on a GPU", found="no CUDA device", fix="use a CUDA device")
    native.load_library()
    results = []
    for case in default_cases() if cases is None else cases:
        runs, counts = _contestants(case, splits)
        times = _race({name: _capture(run) for name, run in runs.items()}, rounds)
        shares = {unit: total[0] / total[1] for unit, total in ((u, c.sum(0).tolist()) for u, c in counts.items())}
        results.append(DecodeResult(case, shares, times))
        if report is not None:
            report(results[-1])
    return results


def format_table(results: list[DecodeResult]) -> str:
    """One line a case: microseconds, and in brackets the time of cuDNN over it and the share of the bound."""
    lines = []
    for r in results:
        c = r.case
        columns = [
            f"{name} {time:7.1f} us ({r.microseconds['cudnn'] / time:.3f}"
            + (f", {100 * r.share_of_bound(name):.0f} % of the bound)" if name.startswith("skip") else ")")
            for name, time in r.microseconds.items()
        ]
        shape = f"D{c.size} B{c.batch} {c.heads}/{c.kv_heads} S{c.length}"
        lines.append(f"{shape:24s} skipped {100 * r.skipped['head']:5.1f} %  " + "  ".join(columns))
    return "\n".join(lines)


def write_json(results: list[DecodeResult], path: Path) -> None:
    """Everything measured, with the device and the versions."""
    document = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "library": native.load_library().version,
        "results": [
            {**asdict(r), "tb_per_s": {name: round(r.terabytes_per_second(name), 3) for name in r.microseconds}}
            for r in results
        ],
    }  # fmt: skip
    path.write_text(json.dumps(document, indent=1) + "\n")
