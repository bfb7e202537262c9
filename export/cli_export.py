"""`sparse-attention export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from export.adapter import Padding
from export.cli_common import DEFAULT_CONFIG, Config, Force, Json, Overrides, Report, Tokens, one_of, print_json, status
from export.engine import require_tensorrt
from export.engine.options import EngineOptions
from export.engine.shapes import DEFAULT_LENGTH
from export.models import DTYPES, LoadedModel, load_model
from export.parity import ParityReport
from export.parity import check as check_file
from export.pipeline import ExportOptions, ExportResult, Runtime, output_format
from export.pipeline import export as export_model
from export.report import print_parity, print_rewriting, write_json
from export.rewrite_file import read_onnx, rewrite
from export.save import check_output
from sparse_attention import attention_modules, load_config
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.errors import CheckError
from sparse_attention.patterns import resolve

_ENGINE: Any = {"rich_help_panel": "TensorRT engines"}


def export(
    model: Annotated[
        str, typer.Argument(help="A directory or id of Hugging Face, a .gguf, module:callable, an .onnx.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="out.onnx or out.engine.")],
    config: Config = DEFAULT_CONFIG,
    overrides: Overrides = None,
    dtype: Annotated[str, typer.Option(help=f"Of weights and activations: {', '.join(DTYPES)}.")] = "float32",
    opset: Annotated[int, typer.Option(min=18, max=24, help="ONNX opset.")] = 23,
    padding: Annotated[
        str, typer.Option(help="What an attention_mask input may hide: none, right, any; auto asks the model.")
    ] = "auto",
    kv_cache: Annotated[
        bool, typer.Option("--kv-cache", help="One graph with a KV cache for prefill, chunks and decode.")
    ] = False,
    static_cache: Annotated[
        int, typer.Option("--static-cache", min=0, help="The same with this many preallocated keys.")
    ] = 0,
    unit: Annotated[str, typer.Option(help="Decide per query head, or jointly per group of heads.")] = "head",
    tunable: Annotated[
        bool, typer.Option("--tunable", help="Add the input threshold_scale, which multiplies every λ (0 = dense).")
    ] = False,
    counts: Annotated[
        bool,
        typer.Option("--counts", help="Add the output tile_counts: tiles skipped and total, per layer and head."),
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not compare the file with PyTorch.")] = False,
    tokens: Tokens = 2048,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be exported, and why not.")] = False,
    report: Report = None,
    force: Force = False,
    as_json: Json = False,
    runtime: Annotated[
        str, typer.Option(help="tensorrt, or tensorrt-rtx: portable, no GPU to build, no plugin.", **_ENGINE)
    ] = "tensorrt",
    shapes: Annotated[
        list[str] | None, typer.Option(help="Range of a dimension, name:min,opt,max. Repeatable.", **_ENGINE)
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens the default shapes reach to.", **_ENGINE)] = DEFAULT_LENGTH,
    plugin: Annotated[Path | None, typer.Option(help="The plugin library.", **_ENGINE)] = None,
    plugin_placement: Annotated[str, typer.Option(help="embedded in the engine, or beside it.", **_ENGINE)] = "beside",
    workspace: Annotated[float | None, typer.Option(help="Scratch memory, GiB at most.", **_ENGINE)] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="Read, and written after the build.", **_ENGINE)] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Also loads in later versions of TensorRT.", **_ENGINE)
    ] = False,
    hardware_compatibility: Annotated[str, typer.Option(help="none, ampere+ or same.", **_ENGINE)] = "none",
    refit: Annotated[bool, typer.Option("--refit", help="Weights may be exchanged later.", **_ENGINE)] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay in host memory.", **_ENGINE)
    ] = False,
    optimization_level: Annotated[int | None, typer.Option(help="0 to 5.", **_ENGINE)] = None,
) -> None:
    """Export MODEL with block-skip attention, and check that the file computes what PyTorch computes."""
    settings = load_config(config, overrides or ())
    kind = output_format(output, settings)
    options = ExportOptions(
        opset=opset,
        padding=cast(Padding, one_of("--padding", padding, ("auto", "none", "right", "any"))),
        kv_cache=kv_cache or static_cache > 0,
        static_cache=static_cache,
        tunable=tunable,
        counts=counts,
        unit=one_of("--unit", unit, ("head", "group")),
    )
    engine = EngineOptions(
        shapes=tuple(shapes or ()),
        max_length=max_length,
        plugin=plugin,
        plugin_placement=cast(Any, one_of("--plugin-placement", plugin_placement, ("embedded", "beside"))),
        workspace_gib=workspace,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatibility=cast(Any, hardware_compatibility),
        refit=refit,
        weight_streaming=weight_streaming,
        optimization_level=optimization_level,
    )
    built_for = cast(Runtime, one_of("--runtime", runtime, ("tensorrt", "tensorrt-rtx")))
    if dry_run:
        _dry_run(model, settings, dtype, unit, as_json)
        return
    check_output(output, force=force)
    if report is not None:
        check_output(report, force=True)
    console = Console(quiet=as_json)
    with status() as progress:
        loaded: LoadedModel | None = None
        if not model.endswith(".onnx"):
            if kind == "tensorrt" and built_for == "tensorrt":
                require_tensorrt(engine)  # a model takes long to load, and much memory
            progress("loading the model")
            loaded = load_model(model, dtype=dtype)
            options = options.with_examples(loaded)
        result = export_model(
            loaded.model if loaded else model, settings, output, options=options, engine=engine, runtime=built_for,
            side_files=loaded.side_files if loaded else (), force=force, progress=progress,
        )  # fmt: skip
        parity = None
        if loaded is not None and output.suffix == ".onnx" and not no_check:
            parity = check_file(
                output, loaded.model, tokenizer=loaded.tokenizer, name=loaded.name, progress=progress,
                tokens=loaded.clip(tokens), signature=options.signature(loaded.model),
            )  # fmt: skip
    _tell(console, result, parity)
    if parity is not None and report is not None:
        write_json(report, parity.as_dict())
    if as_json:
        print_json(_as_dict(result, parity))
    if parity is not None and not parity.passed:
        raise typer.Exit(CheckError.exit_code)


def _dry_run(model: str, settings: SparseAttentionConfig, dtype: str, unit: str, as_json: bool) -> None:
    if model.endswith(".onnx"):
        found, _ = rewrite(read_onnx(Path(model)), settings, unit=unit, dry_run=True)
        if as_json:
            print_json(asdict(found))
        else:
            print_rewriting(Console(), found)
        return
    with status() as progress:
        progress("loading the model")
        loaded = load_model(model, dtype=dtype)
    resolved = resolve(settings, attention_modules(loaded.model))
    if as_json:
        print_json({name: one.as_dict() for name, one in resolved.items()})
        return
    table = Table(title=f"{loaded.name}: what would be exported")
    for column in ("attention module", "becomes the op", "λ prefill", "λ decode", "br x bc"):
        table.add_column(column)
    for name, one in resolved.items():
        prefill, decode = one.thresholds.prefill, one.thresholds.decode
        values = [f"{p.a:.3g}·exp({p.b:.3g}·{p.target:g})/L" if p.a else f"{p.threshold:g}" for p in (prefill, decode)]
        why = "yes" if one.enable else "yes, dense (λ = 0): no pattern enables it"
        table.add_row(name, why, *values, f"{one.br} x {one.bc}")
    Console().print(table)


def _tell(console: Console, result: ExportResult, parity: ParityReport | None) -> None:
    if result.rewriting is not None:
        print_rewriting(console, result.rewriting)
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    console.print(f"wrote {result.path}: {result.nodes} attention nodes ({took})", highlight=False, soft_wrap=True)
    if parity is not None:
        print_parity(console, parity)
    elif result.path.suffix == ".onnx":
        console.print("not checked; `sparse-attention check` compares the file with PyTorch", style="yellow")


def _as_dict(result: ExportResult, parity: ParityReport | None) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "nodes": result.nodes,
        "seconds": result.seconds,
        "rewriting": asdict(result.rewriting) if result.rewriting else None,
        "check": parity.as_dict() if parity else None,
    }
