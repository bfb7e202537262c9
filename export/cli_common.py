"""Options and helpers that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparse_attention.errors import UsageError

Config = Annotated[
    str,
    typer.Option("--config", "-c", help="A configuration file (.yaml, .toml, .json) or the name of a preset."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Overrides a setting: `threshold=0.1`, `threshold.decode=0`, `br=64`. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else.")]
Report = Annotated[Path | None, typer.Option("--report", help="Also write the check's result to this JSON file.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Length of the text that the check runs on.")]

DEFAULT_CONFIG = "skip_softmax_default"

err = Console(stderr=True)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Says on standard error what is being done: a spinner in a terminal, a line each elsewhere."""
    if not err.is_terminal:
        last = ""

        def line(text: str) -> None:
            nonlocal last
            if text.split(",")[0] != last:  # "layer 3 of 30" is for a spinner
                last = text.split(",")[0]
                err.print(f"{text} ...", highlight=False)

        yield line
        return
    with err.status("starting") as spinner:
        yield lambda text: spinner.update(text)


def print_json(value: Any) -> None:
    """JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value` where it is allowed; UsageError otherwise."""
    if value not in allowed:
        raise UsageError("unknown value", where=option, found=value, fix=f"use one of {', '.join(allowed)}")
    return value
