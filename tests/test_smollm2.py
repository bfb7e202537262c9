"""The whole way once on a real language model: fetched, exported, checked, and run by a stock ONNX Runtime."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = 30
ROW = re.compile(r"layers\.(\d+)\.self_attn +0\.1 +(\d+) +(\d+) +\S+ +(\S+) +(\d+)")


@pytest.mark.model
def test_demo(tmp_path: Path) -> None:
    """λ = 0.1 at 2048 tokens: about 24 % of the tiles, every layer's decisions equal outside the band."""
    pytest.importorskip("gguf", reason="the model is a GGUF file: pip install gguf")
    environment = os.environ | {"COLUMNS": "200"}
    command = [sys.executable, "-c", "from export.cli import main; main()", "demo", "-o", "demo/smollm2.onnx"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()

    rows = ROW.findall(done.stdout)
    assert [int(row[0]) for row in rows] == list(range(LAYERS)), done.stdout
    for _, tiles, skipped, error, apart in rows:
        assert int(tiles) == 9 * 16 * 17 // 2  # heads x lower triangle of 16 x 16 tiles
        assert 0 <= int(skipped) < int(tiles) and float(error) <= 2e-5 and apart == "0"
    total, skipped = (sum(int(row[column]) for row in rows) for column in (1, 2))
    assert 0.22 < skipped / total < 0.26
    assert lines[-1].startswith(f"PASSED {LAYERS} layers, {skipped} of {total} tiles skipped (2")
    logits = re.search(r"end to end, logits: max difference (\S+) .* largest value agrees in (\S+) %", done.stdout)
    assert logits is not None and float(logits[1]) <= 1e-3 and float(logits[2]) > 99.5

    beside = {file.name for file in (tmp_path / "demo").iterdir()}
    assert {"smollm2.onnx", "smollm2.onnx.data", "config.json", "tokenizer.json"} <= beside
    code = "\n".join(line.strip() for line in lines if line.startswith("    "))
    command = [sys.executable, "-c", f"{code}\nprint(logits.shape)"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stdout.startswith("(1, 5, "), run.stderr
