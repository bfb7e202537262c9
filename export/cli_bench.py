"""`sparse-attention bench`: the figures that the README quotes, each a command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from export import bench_attention, bench_decode, bench_export, bench_kernels
from export.cli_common import Json, print_json, status
from export.smollm2 import fetch_smollm2

app = typer.Typer(help="Measure: exporting and attention on this CPU, decoding in ONNX Runtime, kernels on a GPU.")

Model = Annotated[str, typer.Option("--model", help="The model to export; SmolLM2-135M by default.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="How often everything is run, in turns.")]


@dataclass(frozen=True)
class Figure:
    """A ratio of two timings of one run, and the bound that it should keep."""

    name: str
    ratio: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the bound is kept."""
        return self.ratio <= self.bound


@app.command("spine")
def spine(model: Model = "", rounds: Rounds = 1, as_json: Json = False) -> None:
    """Exporting against the plain exporter, and the op on this CPU; ratios within one run."""
    with status() as progress:
        progress("attention on the CPU")
        op = bench_attention.measure_op()
        patching = bench_attention.measure_softmax_patching()
        progress("tracing")
        tracing = bench_export.measure_tracing(model or str(fetch_smollm2()), rounds=rounds, kv_cache=True)
    dense = op["op, λ = 0"].seconds
    figures = [
        Figure("trace, seconds: op / plain eager exporter", tracing["op"].seconds / tracing["eager"].seconds, 0.65),
        Figure("trace, peak memory: op / plain eager exporter", tracing["op"].peak_mb / tracing["eager"].peak_mb, 1.1),
        Figure("trace, seconds: with KV cache / without", tracing["cache"].seconds / tracing["op"].seconds, 1.2),
        Figure("op at λ = 0 / SDPA, 2048 tokens", dense / op["sdpa"].seconds, 2.0),
        Figure("op, nothing skipped / λ = 0", op["op, nothing skipped"].seconds / dense, 1.15),
        Figure("op, half skipped / λ = 0", op["op, half skipped"].seconds / dense, 0.9),
        Figure("softmax patched / eager", patching["eager, softmax patched"].seconds / patching["eager"].seconds, 1.15),
        Figure("op / softmax patched", patching["op"].seconds / patching["eager, softmax patched"].seconds, 0.2),
    ]
    _show("spine", figures, {"op": op, "patching": patching, "tracing": tracing}, as_json)


@app.command("decode")
def decode(
    model: Model = "",
    rounds: Rounds = 5,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 1024,
    as_json: Json = False,
) -> None:
    """A decode step in ONNX Runtime against a dense export of the same model with the same cache."""
    with status() as progress:
        progress("exporting twice, then decoding in turns")
        seconds = bench_export.measure_decode(model or str(fetch_smollm2()), context=context, rounds=rounds)
    figures = [Figure(f"seconds a token at {context}: block-skip / dense", seconds["sparse"] / seconds["dense"], 1.15)]
    _show("decode", figures, {"seconds": seconds}, as_json)


@app.command("kernels")
def kernels(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller cases.")] = False,
    rounds: Rounds = 5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write everything to this file.")] = None,
    decoding: Annotated[bool, typer.Option("--decode", help="One query row against a cache, not prefill.")] = False,
    splits: Annotated[
        str,
        typer.Option(help="With --decode: programs that share a head's keys, as 0,16,32; 0 lets the library choose."),
    ] = "0",
    flashinfer: Annotated[
        Path | None,
        typer.Option(help="FlashInfer's compiled module, trtllm_fmha_v2_separate_q_k_v_bf16_bf16.so, to time as well."),
    ] = None,
) -> None:
    """The compiled kernels beside FlashAttention-3 and cuDNN on this GPU."""
    console = Console(soft_wrap=True)
    if decoding:
        if flashinfer is not None:
            raise typer.BadParameter(
                "FlashInfer has no skipping kernel for decode; leave out --decode", param_hint="--flashinfer"
            )
        try:
            numbers = tuple(int(part) for part in splits.split(","))
        except ValueError as error:
            raise typer.BadParameter(
                f"{splits!r} is no list of numbers such as 0,16,32", param_hint="--splits"
            ) from error
        decoded = bench_decode.bench_decode(
            bench_decode.default_cases(quick), rounds=rounds, splits=numbers,
            report=lambda result: console.print(bench_decode.format_table([result]), highlight=False),
        )  # fmt: skip
        if output is not None:
            bench_decode.write_json(decoded, output)
        return
    results = bench_kernels.bench_kernels(
        bench_kernels.default_cases(quick), rounds=rounds, flashinfer=flashinfer,
        report=lambda result: console.print(bench_kernels.format_table([result]), highlight=False),
    )  # fmt: skip
    if output is not None:
        bench_kernels.write_json(results, output)


def _show(title: str, figures: list[Figure], measured: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"figures": [asdict(f) | {"holds": f.holds} for f in figures], "measured": _plain(measured)})
        return
    table = Table(title=f"bench {title}")
    table.add_column("ratio")
    table.add_column("measured", justify="right")
    table.add_column("at most", justify="right")
    for figure in figures:
        style = "" if figure.holds else "red"
        table.add_row(figure.name, f"{figure.ratio:.2f}", f"{figure.bound:.2f}", style=style)
    Console().print(table)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
