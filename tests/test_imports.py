"""The import rule: imports flow one way between packages, and what is optional is imported where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "sparse_attention": {"export", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "typer", "rich"},
    "export": {"plugins", "tests"},
}


def imports(file: Path) -> Iterator[str]:
    """Top-level packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_file_imports_what_its_package_must_not_know(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 20
    wrong = {str(file.relative_to(ROOT)): found for file in files if (found := set(imports(file)) & FORBIDDEN[package])}
    assert not wrong


def test_plugins_is_not_importable() -> None:
    assert not (ROOT / "plugins" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("package", "kept_out"),
    [("sparse_attention", ["export", "onnx", "transformers", "typer"]), ("export", ["tensorrt", "matplotlib"])],
)
def test_importing_loads_nothing_optional(package: str, kept_out: list[str]) -> None:
    code = f"import sys, {package}; print([name for name in {kept_out} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
