"""`sparse-attention doctor`: what is there, what is missing, and the command that provides it."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from export import guard
from export.cli_common import Json, print_json
from sparse_attention.errors import MissingError


class Finding(NamedTuple):
    """One part: whether it is there, what it is, what it is needed for, how to get it."""

    part: str
    there: bool
    found: str
    needed_for: str
    fix: str = ""


_PACKAGES = (
    ("torch", "everything", "pip install torch"),
    ("transformers", "Hugging Face models", "pip install transformers"),
    ("onnx", "export", "pip install onnx"),
    ("onnxscript", "export", "pip install onnxscript"),
    ("onnxruntime", "check, generate", "pip install onnxruntime"),
    ("onnxruntime-gpu", "running .onnx on a GPU", "pip install onnxruntime-gpu"),
    ("tensorrt", "building .engine", "pip install tensorrt"),
    ("triton", "compiling the kernels", "pip install triton==3.9.0"),
    ("matplotlib", "plots", "pip install matplotlib"),
)


def examine() -> list[Finding]:
    """Looks at the machine and its packages; imports nothing heavy but torch."""
    findings = [Finding("python", True, platform.python_version(), "everything")]
    for name, needed_for, fix in _PACKAGES:
        try:
            findings.append(Finding(name, True, importlib.metadata.version(name), needed_for))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, False, "not installed", needed_for, fix))
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
        findings.append(Finding("GPU", True, gpu, "kernels, engines"))
    else:
        findings.append(
            Finding("GPU", False, "none that torch can use", "kernels, engines", "an NVIDIA GPU and driver")
        )
    findings.append(_kernels())
    others = guard.intruders()
    findings.append(
        Finding(
            "import name `export`",
            not others,
            ", ".join(others) or "ours alone",
            "everything",
            f"pip uninstall -y {' '.join(others)}" if others else "",
        )
    )
    return findings


def _kernels() -> Finding:
    from sparse_attention import native

    build = "cmake -S plugins -B build && cmake --build build"
    path = native.find_library()
    if path is None:
        return Finding("kernel library", False, "not built", "CUDA attention, engines", build)
    return Finding("kernel library", True, str(path), "CUDA attention, engines")


def doctor(as_json: Json = False) -> None:
    """Say what is installed, what is missing, and the command that provides it."""
    findings = examine()
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        table = Table(title="sparse-attention doctor")
        for column in ("part", "found", "needed for", "how to get it"):
            table.add_column(column)
        for one in findings:
            table.add_row(one.part, one.found, one.needed_for, one.fix, style="" if one.there else "yellow")
        Console().print(table)
    if not all(one.there for one in findings if one.needed_for == "everything"):
        raise typer.Exit(MissingError.exit_code)
