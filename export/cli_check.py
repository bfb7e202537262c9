"""`sparse-attention check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from export.cli_common import Json, Report, Tokens, print_json, status
from export.engine import check_engine
from export.engine.against import Against, against_model, against_onnx
from export.models import DTYPES, LoadedModel, load_model
from export.parity import check as check_file
from export.pipeline import SUFFIXES
from export.report import print_parity, write_json
from export.runners import metadata, read_graph
from export.save import check_output
from export.signatures import signature_from
from sparse_attention.errors import CheckError


def check(
    file: Annotated[Path, typer.Argument(help="An exported .onnx, or an engine built from one.")],
    against: Annotated[
        str, typer.Option("--against", help="The model it was exported from; for an engine also its .onnx.")
    ],
    tokens: Tokens = 2048,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Of the model: {', '.join(DTYPES)}. Default: an engine's own; float32 for an .onnx."),
    ] = None,
    report: Report = None,
    as_json: Json = False,
    plugin: Annotated[Path | None, typer.Option(help="The plugin library of an engine.")] = None,
) -> None:
    """Compare an exported file with PyTorch, layer by layer and end to end; the last line says PASSED or FAILED."""
    if report is not None:
        check_output(report, force=True)
    if SUFFIXES.get(file.suffix) == "tensorrt":
        _check_engine(file, _other_side(against, tokens, dtype), plugin, report, as_json)
        return
    graph = read_graph(file)
    with status() as progress:
        progress("loading the model")
        loaded = load_model(against, dtype=dtype or "float32")
        described = metadata(graph, "signature") or {}
        signature = signature_from(described, loaded.model, loaded.examples, loaded.dynamic)
        result = check_file(
            file, loaded.model, tokenizer=loaded.tokenizer, name=loaded.name, tokens=loaded.clip(tokens),
            signature=signature, progress=progress,
        )  # fmt: skip
    print_parity(Console(quiet=as_json), result)
    if report is not None:
        write_json(report, result.as_dict())
    if as_json:
        print_json(result.as_dict())
    if not result.passed:
        raise typer.Exit(CheckError.exit_code)


def _other_side(against: str, tokens: int, dtype: str | None) -> Against:
    """What an engine is compared with: its `.onnx` in ONNX Runtime, or the PyTorch model."""
    if against.endswith(".onnx"):
        return against_onnx(Path(against))

    def load(recorded: str) -> LoadedModel:
        with status() as progress:
            progress("loading the model")
            return load_model(against, dtype=dtype or recorded)

    return against_model(load, tokens)


def _check_engine(file: Path, against: Against, plugin: Path | None, report: Path | None, as_json: bool) -> None:
    result = check_engine(file, against, plugin=plugin)
    if report is not None:
        write_json(report, result.as_dict())
    if as_json:
        print_json(result.as_dict())
    else:
        console = Console(soft_wrap=True)
        for one in result.outputs:
            told = f"{one.profile}, {one.output}: difference {one.error:.2e} (at most {one.allowed:.0e})"
            if one.tiles is not None:
                told += "; skipped {} tiles, {} expected, of {}".format(*one.tiles)
            console.print(told, style="" if one.passed else "red", highlight=False)
        for profile, milliseconds in result.milliseconds.items():
            console.print(f"{profile}: {milliseconds:.3f} ms a run", highlight=False)
        for note in result.notes:
            console.print(f"note: {note}", style="yellow", highlight=False)
        word = "PASSED" if result.passed else "FAILED"
        console.print(f"{word} {len(result.outputs)} outputs", style="bold green" if result.passed else "bold red")
    if not result.passed:
        raise typer.Exit(CheckError.exit_code)
