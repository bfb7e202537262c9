"""How fast the compiled kernels are, beside FlashAttention-3 and cuDNN, on inputs whose skipped tiles are counted.

Everything that is compared runs interleaved in the same rounds: a card under load changes its clock, so only ratios
within a run say something. FlashAttention-3 is taken from the wheel `fa3-fwd==0.0.3` where that is installed,
FlashAttention-2 from PyTorch where it is not. FlashInfer's skipping kernel takes part if its compiled module is given.
"""

from __future__ import annotations

import importlib
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attention import native
from sparse_attention.errors import MissingError, UsageError

__all__ = ["Case", "Result", "bench_kernels", "default_cases", "format_table", "host_overhead", "write_json"]

COLUMNS = 128
THRESHOLD = 1e-3
"""λ that lies several units from every planted tile's score gap."""


@dataclass(frozen=True, slots=True)
class Case:
    """One shape; `keep` is the share of key tiles planted to be kept (None: Gaussian inputs, which skip nothing).

    `uneven` plants 5 % and 95 % in alternate heads instead of one share in all.
    """

    size: int
    length: int
    causal: bool
    keep: float | None = None
    batch: int = 1
    heads: int = 32
    kv_heads: int = 32
    uneven: bool = False


@dataclass(slots=True)
class Result:
    """Median milliseconds by name, and the share of tiles that the kernels counted as skipped."""

    case: Case
    skipped: float
    milliseconds: dict[str, float] = field(default_factory=dict)

    def teraflops(self, name: str) -> float:
        """As if dense: what is skipped counts as done."""
        c = self.case
        flop = 4 * c.batch * c.heads * c.length**2 * c.size * (0.5 if c.causal else 1.0)
        return flop / self.milliseconds[name] / 1e9

    def share_of_bound(self, name: str) -> float:
        """Speed-up over the own dense kernel, as a share of `2 / (1 + kept)`: scores always, the rest where kept."""
        return self.milliseconds["dense"] / self.milliseconds[name] * (2 - self.skipped) / 2


def default_cases(quick: bool = False) -> list[Case]:
    """The shapes of the README's tables; `quick` takes a few of them."""
    cases = []
    for causal in (False, True):
        for length in (16384,) if quick else (1024, 2048, 4096, 8192, 16384, 32768):
            cases.append(Case(128, length, causal, batch=max(1, 16384 // length)))
        for keep in (0.5, 0.25, 0.1):
            for length in (16384,) if quick else (16384, 65536):
                cases.append(Case(128, length, causal, keep))
            if not quick:
                cases.append(Case(64, 16384, causal, keep))
        if not quick:
            cases += [Case(64, length, causal, batch=16384 // length) for length in (2048, 4096, 8192, 16384)]
            cases.append(Case(256, 8192, causal, batch=2))
    if not quick:
        cases += [Case(128, 16384, False, uneven=True), Case(128, 16384, True, uneven=True)]
        for heads, kv_heads in ((32, 8), (64, 4)):
            for kv in (heads, kv_heads):
                cases.append(Case(128, 8192, True, heads=heads, kv_heads=kv))
    return cases


def plant(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[B, H, S, D] bfloat16`: keys of a wanted tile lie along a direction that every query shares."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(heads: int) -> Tensor:
        shape = (case.batch, heads, case.length, case.size)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    q, k, v = normal(case.heads), normal(case.kv_heads), normal(case.kv_heads)
    if case.keep is None and not case.uneven:
        return q, k, v
    direction = torch.zeros(case.size, device="cuda", dtype=torch.bfloat16)
    direction[::2] = 1 / math.sqrt(case.size / 2)
    q += 8 * direction
    share = torch.full((case.kv_heads,), case.keep or 0.0, device="cuda")
    if case.uneven:
        share[0::2], share[1::2] = 0.05, 0.95
    tiles = case.length // COLUMNS
    wanted = torch.rand(case.batch, case.kv_heads, tiles, device="cuda", generator=generator) < share[:, None]
    wanted[:, :, 0] = True
    k += (wanted.repeat_interleave(COLUMNS, 2)[..., None] * (14 * math.sqrt(case.size) / 8) * direction).to(k.dtype)
    return q, k, v


def _ours(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, threshold: float, br: int
) -> tuple[Callable[[], None], Tensor]:
    library = native.load_library()
    out = torch.empty_like(q)
    counts = torch.empty(q.shape[1], 2, dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {"is_causal": causal, "threshold": threshold, "br": br, "scale": q.shape[3] ** -0.5}
    counted = native.pack(q, k, v, out, counts=counts, **options)
    workspace = torch.empty(library.workspace_size(counted), dtype=torch.uint8, device="cuda")
    library.launch(counted.with_workspace(workspace), torch.cuda.current_stream().cuda_stream)
    call = native.pack(q, k, v, out, **options).with_workspace(workspace)
    return lambda: library.launch(call, torch.cuda.current_stream().cuda_stream), counts


def _flashinfer(module: Path, q: Tensor, k: Tensor, v: Tensor, causal: bool, threshold: float) -> Callable[[], object]:
    """`trtllm_fmha_v2_prefill` of FlashInfer 0.7 on ragged `[B * S, H, D]`, which decides tiles of 64 x 128 as well.

    Its threshold is a factor divided by the number of keys.
    """
    try:
        run = importlib.import_module("tvm_ffi").load_module(str(module)).run
    except ImportError as error:
        raise MissingError(
            "FlashInfer's module cannot be loaded", found="no package tvm_ffi", fix="pip install apache-tvm-ffi"
        ) from error
    except (RuntimeError, AttributeError) as error:
        raise UsageError(
            "that is no module of FlashInfer's attention", where=str(module), found=str(error),
            fix="give trtllm_fmha_v2_separate_q_k_v_bf16_bf16.so, as FlashInfer compiled it",
        ) from error  # fmt: skip
    batch, _, length, size = q.shape
    q, k, v = (t.transpose(1, 2).contiguous().view(-1, t.shape[1], size) for t in (q, k, v))
    out = torch.empty_like(q)
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * length
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    mask = "causal" if causal else "padding"
    arguments = (
        q, k, v, out, workspace, workspace.numel(), None, 0, lengths, starts, starts, "separate_q_k_v", length, length,
        batch, mask, 1.0, size**-0.5, 1.0, -1, 0, False, 0.0, threshold * length, None, None,
    )  # fmt: skip
    return lambda: run(*arguments)


def _contestants(
    case: Case, brs: tuple[int, ...], flashinfer: Path | None
) -> tuple[dict[str, Callable[[], object]], float]:
    q, k, v = plant(case)
    runs: dict[str, Callable[[], object]] = {}

    def sdpa(backend: torch.nn.attention.SDPBackend) -> Callable[[], Tensor]:
        def attend() -> Tensor:
            with torch.nn.attention.sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads
                )

        return attend

    try:
        fa3 = importlib.import_module("fa3_fwd_interface")
        q2, k2, v2 = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        runs["fa3"] = lambda: fa3.flash_attn_func(q2, k2, v2, causal=case.causal)
    except ImportError:
        runs["fa2"] = sdpa(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    runs["cudnn"] = sdpa(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    runs["dense"], _ = _ours(q, k, v, case.causal, 0.0, 128)
    skipped = 0.0
    for br in brs:
        runs[f"skip {br}x{COLUMNS}"], counts = _ours(q, k, v, case.causal, THRESHOLD, br)
        total = counts.sum(0).tolist()
        skipped = total[0] / total[1]
    if flashinfer is not None and case.size == 128:
        runs["flashinfer"] = _flashinfer(flashinfer, q, k, v, case.causal, THRESHOLD)
    return runs, skipped


def _race(runs: dict[str, Callable[[], object]], rounds: int, turn: float = 20.0) -> dict[str, float]:
    """Median milliseconds of each, over rounds in which all take their turn in random order.

    These kernels run into the card's power limit, which answers within milliseconds: a turn first runs `turn`
    milliseconds untimed, so that nobody is timed at the clock that the one before has earned.
    """
    calls = {}
    for name, run in runs.items():
        run()
        calls[name] = max(2, int(turn / _milliseconds(run, 2)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            for _ in range(calls[name]):
                runs[name]()
            times[name].append(_milliseconds(runs[name], calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _milliseconds(run: Callable[[], object], calls: int) -> float:
    """Per call, on the current stream, behind whatever was enqueued before."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / calls


def bench_kernels(
    cases: list[Case] | None = None,
    *,
    rounds: int = 5,
    brs: tuple[int, ...] = (64, 128),
    flashinfer: Path | None = None,
    report: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Times every case; `report` is called with each result as soon as it is there.

    `flashinfer`: the module that FlashInfer compiles, `trtllm_fmha_v2_separate_q_k_v_bf16_bf16.so`; heads of 128 only.

    Raises:
        MissingError: no GPU, no kernel library, no such module, or nothing to load it with.
        UsageError: the module is another one.
    """
    if flashinfer is not None and not flashinfer.is_file():
        raise MissingError(
            "FlashInfer's module is not there", where=str(flashinfer), found="no such file",
            fix="FlashInfer leaves it in its cache when trtllm_fmha_v2_prefill is first called with SEPARATE_Q_K_V",
        )  # fmt: skip
    if not torch.cuda.is_available():
        raise MissingError(
            "the kernels can only be timed on a GPU", found="no CUDA device",
            fix="use a GPU of compute capability 8.0 or later",
        )  # fmt: skip
    native.load_library()
    results = []
    for case in default_cases() if cases is None else cases:
        runs, skipped = _contestants(case, brs, flashinfer)
        result = Result(case, skipped, _race(runs, rounds))
        results.append(result)
        if report is not None:
            report(result)
    return results


def host_overhead(calls: int = 200) -> float:
    """Microseconds the host spends in one call of the op after the first, with nothing waited for."""
    from sparse_attention import block_skip_attention

    q, k, v = plant(Case(128, 256, True, heads=4, kv_heads=4))
    block_skip_attention(q, k, v, threshold=THRESHOLD, is_causal=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        block_skip_attention(q, k, v, threshold=THRESHOLD, is_causal=True)
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def format_table(results: list[Result]) -> str:
    """One line a case: TFLOP/s as if dense, and in brackets the ratio to FlashAttention-3 (or cuDNN without it)."""
    lines = []
    for r in results:
        c = r.case
        base = "fa3" if "fa3" in r.milliseconds else "cudnn"
        shape = f"D{c.size} B{c.batch} {c.heads}/{c.kv_heads} S{c.length} {'causal' if c.causal else 'full':6s}"
        columns = [
            f"{name} {r.teraflops(name):6.0f} ({r.milliseconds[base] / r.milliseconds[name]:.3f}"
            + (f", {100 * r.share_of_bound(name):.0f} % of the bound)" if name.startswith("skip") else ")")
            for name in r.milliseconds
        ]
        lines.append(f"{shape:34s} skipped {100 * r.skipped:5.1f} %  " + "  ".join(columns))
    return "\n".join(lines)


def write_json(results: list[Result], path: Path) -> None:
    """Everything measured, with the device and the versions."""
    document = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "library": native.load_library().version,
        "host_overhead_us": host_overhead(),
        "results": [{**asdict(r), "tflops": {n: round(r.teraflops(n), 1) for n in r.milliseconds}} for r in results],
    }  # fmt: skip
    path.write_text(json.dumps(document, indent=1) + "\n")
