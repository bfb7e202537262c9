"""TensorRT-RTX parses and builds the portable model, without a GPU, and says that it is not accelerated."""

from __future__ import annotations

import json
from pathlib import Path

from tensorrt_models import attention_model
from tensorrt_support import Run

BUILD = r"""
import io, json, sys
from pathlib import Path
from rich.console import Console
from export.engine import EngineOptions
from export.runtime_rtx import build_portable_engine

said = io.StringIO()
report = build_portable_engine(Path(sys.argv[1]), Path(sys.argv[2]), console=Console(file=said, width=1000),
                               options=EngineOptions(shapes=("sequence:1,64,256",)))
print(json.dumps({"said": said.getvalue(), "notes": report.notes, "bytes": report.bytes, "nodes": report.nodes}))
"""

REFUSED = r"""
import sys
from pathlib import Path
from export.runtime_rtx import build_portable_engine
from sparse_attention.errors import SparseAttentionError
try:
    build_portable_engine(Path(sys.argv[1]), Path(sys.argv[2]))
except SparseAttentionError as error:
    print(error.exit_code, error)
"""


def test_builds_the_exported_model(run_rtx: Run, tmp_path: Path) -> None:
    onnx = attention_model(tmp_path / "m.onnx", counts=True, layers=2)
    result = run_rtx(BUILD, onnx, tmp_path / "m.engine")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["nodes"] == 2
    assert "portable, not accelerated" in found["said"]
    assert "portable, not accelerated" in found["notes"][0]
    assert (tmp_path / "m.engine").stat().st_size == found["bytes"]
    record = json.loads((tmp_path / "m.engine.json").read_text())
    assert record["runtime"] == "tensorrt-rtx"
    assert record["plugin"] is None


def test_needs_the_function_body(run_rtx: Run, tmp_path: Path) -> None:
    onnx = attention_model(tmp_path / "m.onnx", with_body=False)
    result = run_rtx(REFUSED, onnx, tmp_path / "m.engine")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("2 The model carries no function body")
    assert not (tmp_path / "m.engine").exists()
