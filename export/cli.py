"""`sparse-attention`: the command line. Each command is a thin call of a public function of the same name.

Exit codes: 0 done, 1 a check failed, 2 usage or configuration, 3 something is missing, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

import typer
from rich.console import Console

from export import (
    cli_bench,
    cli_calibrate,
    cli_check,
    cli_demo,
    cli_doctor,
    cli_export,
    cli_generate,
    cli_quality,
    cli_schema,
)
from sparse_attention.errors import SparseAttentionError

INTERRUPTED = 130

app = typer.Typer(
    name="sparse-attention",
    help="Export transformers to ONNX and TensorRT with attention that skips work, and prove what it computes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("export")(cli_export.export)
app.command("check")(cli_check.check)
app.command("demo")(cli_demo.demo)
app.command("doctor")(cli_doctor.doctor)
app.command("generate")(cli_generate.generate)
app.command("calibrate")(cli_calibrate.calibrate)
app.command("quality")(cli_quality.quality)
app.add_typer(cli_bench.app, name="bench", no_args_is_help=True)
app.command("schema")(cli_schema.schema)


class _Interrupt:
    """Remembers a Ctrl-C: inside PyTorch's tracer it can come out as another exception, with words of torch's own."""

    seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        logging.disable()
        raise KeyboardInterrupt

    def end(self) -> None:
        Console(stderr=True).print("interrupted; nothing was left half-written", style="yellow")
        sys.exit(INTERRUPTED)


def main() -> None:
    """Runs the command line; a user's mistake ends in one message, a bug in a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    interrupt = _Interrupt()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED or (interrupt.seen and end.code):  # typer ends so on Ctrl-C, without a word
            interrupt.end()
        raise
    except SparseAttentionError as error:
        if interrupt.seen:
            interrupt.end()
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except Exception:
        if interrupt.seen:
            interrupt.end()
        raise
