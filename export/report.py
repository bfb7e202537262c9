"""Results for people: tables in a terminal, JSON in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from export.parity import EndToEnd, ParityReport
from export.rewrite import RewriteReport
from export.save import check_output, staged


def print_parity(console: Console, report: ParityReport) -> None:
    """A row per layer, the end-to-end comparison, and one last line `PASSED ...` or `FAILED ...`."""
    console.print(f"{report.file} against {report.against} in PyTorch, {report.tokens} tokens, {report.dtype}",
                  highlight=False, soft_wrap=True)  # fmt: skip
    table = Table(box=SIMPLE, pad_edge=False)  # narrow enough for a terminal of 80 columns
    table.add_column("attention layer", overflow="fold")  # gives way: a figure cut short would tell nothing
    for column in ("λ", "tiles", "skipped", "%", "error", "apart"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in report.layers:
        apart = str(layer.different) + (f"+{len(layer.in_band)}" if layer.in_band else "")
        table.add_row(
            layer.name + (" (decode)" if layer.phase == "decode" else ""), f"{layer.threshold:.3g}", str(layer.tiles),
            str(layer.skipped), f"{100 * layer.skipped / max(layer.tiles, 1):.1f}", f"{layer.error:.1e}", apart,
            style="" if layer.passed else "red",
        )  # fmt: skip
    console.print(table)
    console.print(
        "error: largest difference of the outputs over max|v|; apart: tiles decided otherwise"
        + (" (+ those within rounding of ln λ)" if any(layer.in_band for layer in report.layers) else ""),
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip
    for name, outputs in _grouped(report.outputs).items():
        worst = max(outputs, key=lambda output: output.error)
        judged = "reported only" if worst.tolerance is None else f"tolerance {worst.tolerance:.0e}"
        agreement = min(output.top1_agreement for output in outputs)
        console.print(
            f"end to end, {name}: max difference {worst.error:.2e} ({judged})"
            + ("" if name.startswith("present") else f", largest value agrees in {100 * agreement:.1f} %"),
            style=None if all(output.passed for output in outputs) else "red",
            highlight=False,
            soft_wrap=True,
        )
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    style = "bold green" if report.passed else "bold red"
    console.print(verdict(report), style=style, highlight=False, soft_wrap=True)


def _grouped(outputs: Sequence[EndToEnd]) -> dict[str, list[EndToEnd]]:
    """By name, the caches of all layers together; outputs of a second call (decode) fall to those of the first."""
    groups: dict[str, list[EndToEnd]] = {}
    for output in outputs:
        groups.setdefault("present.*" if output.output.startswith("present.") else output.output, []).append(output)
    return groups


def verdict(report: ParityReport) -> str:
    """The last line of a check."""
    share = 100 * report.skipped / max(report.tiles, 1)
    skipping = f"{report.skipped} of {report.tiles} tiles skipped ({share:.1f} %)"
    if report.passed:
        return f"PASSED {len(report.layers)} layers, {skipping}, decisions equal, outputs within tolerance"
    failed = [layer.name for layer in report.layers if not layer.passed]
    failed += [output.output for output in report.outputs if not output.passed]
    return f"FAILED {len(failed)} of {len(report.layers) + len(report.outputs)}: {', '.join(failed[:4])}; {skipping}"


def print_rewriting(console: Console, report: RewriteReport) -> None:
    """Every attention of a graph: rewritten, or left with the reason."""
    console.print(str(report), highlight=False, markup=False)


def write_json(path: Path, value: Any, *, force: bool = True) -> None:
    """Writes a report as JSON, whole or not at all."""
    check_output(path, force=force)
    with staged(path) as stage:
        (stage / path.name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
