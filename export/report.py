"""Results for people: tables in a terminal, JSON in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from export.parity import EndToEnd, ParityReport
from export.rewrite import RewriteReport
from export.save import check_output, staged


def print_parity(console: Console, report: ParityReport) -> None:
    """A row per layer, the end-to-end comparison, and one last line `PASSED ...` or `FAILED ...`."""
    table = Table(title=f"{report.file} against {report.against} in PyTorch, {report.tokens} tokens, {report.dtype}")
    table.add_column("attention layer")
    table.add_column("phase")
    for column in ("λ", "tiles", "skipped", "%", "max error", "decided apart"):
        table.add_column(column, justify="right")
    for layer in report.layers:
        apart = str(layer.different) + (f" (+{len(layer.in_band)} in band)" if layer.in_band else "")
        table.add_row(
            layer.name, layer.phase, f"{layer.threshold:.3g}", str(layer.tiles), str(layer.skipped),
            f"{100 * layer.skipped / max(layer.tiles, 1):.1f}", f"{layer.error:.1e}", apart,
            style="" if layer.passed else "red",
        )  # fmt: skip
    console.print(table)
    for name, outputs in _grouped(report.outputs).items():
        worst = max(outputs, key=lambda output: output.error)
        judged = "reported only" if worst.tolerance is None else f"tolerance {worst.tolerance:.0e}"
        agreement = min(output.top1_agreement for output in outputs)
        console.print(
            f"end to end, {name}: max difference {worst.error:.2e} ({judged})"
            + ("" if name.startswith("present") else f", largest value agrees in {100 * agreement:.1f} %"),
            style=None if all(output.passed for output in outputs) else "red",
            highlight=False,
        )
    for note in report.notes:
        console.print(f"note: {note}", style="yellow")
    console.print(verdict(report), style="bold green" if report.passed else "bold red", highlight=False)


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
