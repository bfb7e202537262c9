"""`sparse-attention demo`: the whole way on a real language model, from nothing to a verified file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from export.cli_common import Force, Tokens, err, status
from export.models import load_model
from export.parity import check as check_file
from export.pipeline import export_onnx
from export.report import print_parity
from export.save import check_output
from export.smollm2 import fetch_smollm2
from sparse_attention.errors import CheckError

_RUN_IT = """\
run it with any ONNX Runtime, nothing else installed:

    import numpy, onnxruntime
    session = onnxruntime.InferenceSession("{path}")
    logits, = session.run(["logits"], {{"input_ids": numpy.array([[504, 3575, 282, 4649, 314]])}})  # The capital of ...

compare it with PyTorch again: sparse-attention check {path} --against {model}
for text generation, export with a cache: sparse-attention export {model} -o chat/smollm2.onnx --kv-cache\
"""


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the .onnx goes.")] = Path("demo/smollm2.onnx"),
    threshold: Annotated[float, typer.Option(min=0, max=0.999, help="λ; at 0 nothing is skipped.")] = 0.1,
    tokens: Tokens = 2048,
    force: Force = False,
) -> None:
    """Fetch SmolLM2-135M, export it with block-skip attention, and check the file against PyTorch."""
    check_output(output, force=force)
    columns = (TextColumn("fetching SmolLM2-135M"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("fetch", total=None)
        path = fetch_smollm2(lambda done, total: bar.update(task, completed=done, total=total))
        bar.update(task, visible=False)
    config = {"sparse_cfg": {"*attention*": {"threshold": threshold}, "default": {"enable": False}}}
    with status() as progress:
        progress("loading the model")
        loaded = load_model(str(path))
        result = export_onnx(loaded.model, config, output, side_files=loaded.side_files, force=force, progress=progress)
        report = check_file(
            output, loaded.model, tokenizer=loaded.tokenizer, name=loaded.name, tokens=tokens, progress=progress
        )
    console = Console(soft_wrap=True)
    console.print(f"wrote {result.path}: {result.nodes} attention nodes, λ = {threshold:g}", highlight=False)
    console.print(_RUN_IT.format(path=output, model=path), highlight=False, markup=False)
    print_parity(console, report)
    if not report.passed:
        raise typer.Exit(CheckError.exit_code)
