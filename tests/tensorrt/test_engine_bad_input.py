"""Bad input through the command line: one message with cause and fix, exit code 2 or 3, every file as it was.

The program runs with the real TensorRT 11 binding on TensorRT-RTX's libraries, on a machine without a GPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tensorrt_models import attention_model
from tensorrt_support import Run

COMMANDS = r"""
import contextlib, io, json, os, sys
from pathlib import Path
from export import cli
os.chdir(sys.argv[1])

def listing():
    return {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file()}

answers = {}
for name, arguments in json.loads(sys.argv[2]).items():
    before, said = listing(), io.StringIO()
    sys.argv = ["sparse-attention", *arguments]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
    answers[name] = code, said.getvalue(), listing() == before
print(json.dumps(answers))
"""

EXPORT = ("-o", "out.engine", "--plugin")
PLUGIN = "plugin.so"
CASES: dict[str, tuple[list[str], int, list[str]]] = {
    "another version of the op": (["export", "v2.onnx", *EXPORT, PLUGIN], 2, ["another version of the op", "2"]),
    "rows of a tile": (["export", "br77.onnx", *EXPORT, PLUGIN], 2, ["no kernel", "node layer0", "64 x 128"]),
    "columns of a tile": (["export", "bc64.onnx", *EXPORT, PLUGIN], 2, ["no kernel", "node layer0", "128 keys"]),
    "group in prefill": (["export", "group.onnx", *EXPORT, PLUGIN], 2, ["profile prefill", 'use unit "head"']),
    "float32": (["export", "float32.onnx", *EXPORT, PLUGIN], 2, ["--dtype float16"]),
    "cut off": (["export", "cut.onnx", *EXPORT, PLUGIN], 2, ["cut.onnx"]),
    "no model": (["export", "none.onnx", *EXPORT, PLUGIN], 3, ["none.onnx"]),
    "no such dimension": (
        ["export", "good.onnx", *EXPORT, PLUGIN, "--shapes", "tokens:1"], 2, ["tokens", "batch, sequence, past"]),
    "no plugin": (["export", "good.onnx", *EXPORT, "none.so"], 3, ["not built", "cmake -S plugins"]),
    "no library": (["export", "good.onnx", *EXPORT, "text.so"], 3, ["cannot be loaded", "text.so"]),
    "another library": (["export", "good.onnx", *EXPORT, "strange.so"], 3, ["not this project's TensorRT plugin"]),
    "another major": (["export", "good.onnx", *EXPORT, "old.so"], 3, ["compiled for", "8.6.1", "TENSORRT_ROOT"]),
    "no GPU": (["export", "good.onnx", *EXPORT, PLUGIN], 3, ["there is none", "tensorrt-rtx"]),
    "without our op": (
        ["export", "plain.onnx", "-o", "out.engine", "--runtime", "tensorrt-rtx"], 2, ["no attention"]),
    "engine there": (["export", "good.onnx", "-o", "good.engine", "--plugin", PLUGIN], 2, ["exists already"]),
    "no engine": (["check", "none.engine", "--against", "good.onnx"], 3, ["none.engine"]),
    "truncated engine": (["check", "truncated.engine", "--against", "none"], 3, ["cut off", "built with"]),
    "tampered engine": (["check", "tampered.engine", "--against", "none"], 3, ["not the one that was built"]),
    "no record": (["check", "alone.engine", "--against", "good.onnx"], 3, ["no record", "alone.engine.json"]),
    "broken record": (["check", "broken.engine", "--against", "good.onnx"], 3, ["cannot be read"]),
    "engine without a GPU": (["check", "good.engine", "--against", "none"], 3, ["An engine runs on a GPU"]),
}  # fmt: skip

BUILD = r"""
import sys
from pathlib import Path
from export.engine import EngineOptions
from export.runtime_rtx import build_portable_engine
build_portable_engine(Path(sys.argv[1]), Path(sys.argv[2]), options=EngineOptions(max_length=32))
"""


def library(path: Path, code: str) -> None:
    source = path.with_suffix(".c")
    source.write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", path], check=True)


@pytest.fixture
def work(tmp_path: Path, plugin_library: Path, run_rtx: Run) -> Path:
    """A directory with models, libraries and engines, most of them bad."""
    attention_model(tmp_path / "good.onnx")
    attention_model(tmp_path / "v2.onnx", domain_version=2)
    attention_model(tmp_path / "br77.onnx", br=77)
    attention_model(tmp_path / "bc64.onnx", bc=64)
    attention_model(tmp_path / "group.onnx", unit="group")
    attention_model(tmp_path / "float32.onnx", dtype=TensorProto.FLOAT)
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "good.onnx").read_bytes()[:-40])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", 1, (2,))], [value("y", 1, (2,))]
    )
    onnx.save(helper.make_model(graph), tmp_path / "plain.onnx")
    (tmp_path / PLUGIN).symlink_to(plugin_library)
    (tmp_path / "text.so").write_text("no library")
    library(tmp_path / "strange.so", "int nothing;")
    info = json.dumps({"plugin_version": "1", "tensorrt_headers": "8.6.1", "kernels": {}}).replace('"', r"\"")
    library(tmp_path / "old.so", f'char const* blockskipPluginInfo(void) {{ return "{info}"; }}')
    built = run_rtx(BUILD, tmp_path / "good.onnx", tmp_path / "good.engine")
    assert built.returncode == 0, built.stderr
    for name in ("truncated", "tampered", "alone", "broken"):
        shutil.copy(tmp_path / "good.engine", tmp_path / f"{name}.engine")
        shutil.copy(tmp_path / "good.engine.json", tmp_path / f"{name}.engine.json")
    engine = bytearray((tmp_path / "good.engine").read_bytes())
    (tmp_path / "truncated.engine").write_bytes(engine[:-100])
    engine[5000] ^= 1
    (tmp_path / "tampered.engine").write_bytes(engine)
    (tmp_path / "alone.engine.json").unlink()
    (tmp_path / "broken.engine.json").write_text("{}")
    return tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of the messages are those of a machine without a GPU")
def test_one_message_with_cause_and_fix_and_nothing_written(work: Path, run_bindings: Run) -> None:
    result = run_bindings(COMMANDS, work, json.dumps({name: case[0] for name, case in CASES.items()}))
    assert result.returncode == 0, result.stderr[-2000:]
    answers = json.loads(result.stdout.splitlines()[-1])
    wrong = []
    for name, (_, code, words) in CASES.items():
        found, said, unchanged = answers[name]
        one_message = said.count("error: ") == 1 and "  fix: " in said and "Traceback" not in said
        if not (found == code and unchanged and one_message and all(word in said for word in words)):
            wrong.append((name, found, unchanged, said))
    assert not wrong
