"""`sparse-attention check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from export.cli_common import Json, Report, Tokens, print_json, status
from export.models import DTYPES, load_model
from export.parity import check as check_file
from export.report import print_parity, write_json
from export.runners import metadata, read_graph
from export.save import check_output
from export.signatures import signature_from
from sparse_attention.errors import CheckError


def check(
    file: Annotated[Path, typer.Argument(help="An exported .onnx.")],
    against: Annotated[str, typer.Option("--against", help="The model that it was exported from.")],
    tokens: Tokens = 2048,
    dtype: Annotated[str, typer.Option(help=f"The file's dtype: {', '.join(DTYPES)}.")] = "float32",
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Compare an exported file with PyTorch, layer by layer and end to end; the last line says PASSED or FAILED."""
    graph = read_graph(file)
    if report is not None:
        check_output(report, force=True)
    with status() as progress:
        progress("loading the model")
        loaded = load_model(against, dtype=dtype)
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
