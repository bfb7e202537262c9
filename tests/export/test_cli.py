"""The program in a process: exit codes, messages, files; one message for a mistake, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.command_line import PROGRAM, CommandLine, Done
from tests.conftest import Exported

Export = Callable[..., Exported]
SETTINGS = ["--set", "br=4", "--set", "bc=4", "--set", "threshold=0.7"]


@pytest.fixture
def work(tmp_path: Path, llama_directory: Path) -> Path:
    """A directory with a model, a configuration, and things that are neither."""
    shutil.copytree(llama_directory, tmp_path / "llama")
    for name in ("no_weights", "pickled"):
        shutil.copytree(llama_directory, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "empty").mkdir()
    (tmp_path / "exists.onnx").write_text("mine")
    (tmp_path / "file").write_text("")
    configurations = {
        "good.yaml": "sparse_cfg:\n  '*attn*': {threshold: 0.7, br: 4, bc: 4}\n",
        "syntax.yaml": "sparse_cfg:\n  '*attn*': {threshold: 0.7\n  default: [\n",
        "syntax.json": '{"sparse_cfg": ',
        "syntax.toml": "sparse_cfg = {",
        "nothing.yaml": "sparse_cfg:\n  '*no_such_layer*': {threshold: 0.7}\n",
        "br.yaml": "sparse_cfg:\n  '*attn*': {br: 0}\n",
        "one.yaml": "sparse_cfg:\n  '*attn*': {threshold: 1.0}\n",
        "key.yaml": "sparse_cfg:\n  '*attn*': {treshold: 0.1}\n",
        "causal.yaml": "sparse_cfg:\n  '*attn*': {is_causal: false}\n",
        "engine.yaml": "sparse_cfg:\n  '*attn*': {threshold: 0.1}\nexport_format: tensorrt\n",
        "pickle.pkl": "",
    }
    for name, text in configurations.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def listing(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


OUT = ["-o", "out.onnx"]
MISTAKES: dict[str, tuple[list[str], int, list[str]]] = {
    "model_file_missing": (["export", "none.gguf", *OUT], 3, ["no such file", "none.gguf"]),
    "model_directory_missing": (["export", "./none", *OUT], 3, ["no such model", "./none"]),
    "no_model_in_directory": (["export", "empty", *OUT], 3, ["no config.json"]),
    "no_weights": (["export", "no_weights", *OUT], 3, ["without weights", "no_weights"]),
    "pickled_weights": (["export", "pickled", *OUT], 2, ["unpickled", "pytorch_model.bin"]),
    "onnx_missing": (["export", "none.onnx", *OUT], 3, ["none.onnx"]),
    "onnx_broken": (["export", "exists.onnx", *OUT], 2, ["exists.onnx"]),
    "callable_missing": (["export", "no_such_module:x", *OUT], 3, ["no_such_module"]),
    "configuration_missing": (["export", "llama", *OUT, "-c", "none.yaml"], 3, ["none.yaml"]),
    "yaml_syntax": (["export", "llama", *OUT, "-c", "syntax.yaml"], 2, ["syntax.yaml", "line"]),
    "json_syntax": (["export", "llama", *OUT, "-c", "syntax.json"], 2, ["syntax.json", "line"]),
    "toml_syntax": (["export", "llama", *OUT, "-c", "syntax.toml"], 2, ["syntax.toml", "end of document"]),
    "configuration_of_unknown_kind": (["export", "llama", *OUT, "-c", "pickle.pkl"], 2, ["pickle.pkl", ".yaml"]),
    "pattern_matches_nothing": (
        ["export", "llama", *OUT, "-c", "nothing.yaml"], 2, ["*no_such_layer*", "model.layers.0.self_attn"]),
    "br_0": (["export", "llama", *OUT, "-c", "br.yaml"], 2, ["br", "0"]),
    "br_0_by_override": (["export", "llama", *OUT, "--set", "br=0"], 2, ["br", "0"]),
    "threshold_1": (["export", "llama", *OUT, "-c", "one.yaml"], 2, ["threshold", "1"]),
    "threshold_1_by_override": (["export", "llama", *OUT, "--set", "threshold=1"], 2, ["threshold"]),
    "unknown_key": (["export", "llama", *OUT, "-c", "key.yaml"], 2, ["treshold", "threshold"]),
    "is_causal_contradicts": (["export", "llama", *OUT, "-c", "causal.yaml"], 2, ["is_causal", "self_attn"]),
    "override_of_nothing": (["export", "llama", *OUT, "--set", "tile=3"], 2, ["tile"]),
    "output_exists": (["export", "llama", "-o", "exists.onnx"], 2, ["exists already", "--force"]),
    "output_is_a_directory": (["export", "llama", "-o", "empty.onnx/../empty"], 2, ["empty"]),
    "output_below_a_file": (["export", "llama", "-o", "file/out.onnx"], 2, ["cannot be written", "file/out.onnx"]),
    "output_of_unknown_kind": (["export", "llama", "-o", "out.bin"], 2, ["out.bin", ".onnx, .engine"]),
    "format_contradicts_suffix": (["export", "llama", *OUT, "-c", "engine.yaml"], 2, ["export_format", "out.onnx"]),
    "report_below_a_file": (["export", "llama", *OUT, "--report", "file/r.json"], 2, ["cannot be written"]),
    "unknown_dtype": (["export", "llama", *OUT, "--dtype", "int8"], 2, ["int8", "float32"]),
    "unknown_padding": (["export", "llama", *OUT, "--padding", "up"], 2, ["--padding", "up", "none, right, any"]),
    "unknown_unit": (["export", "llama", *OUT, "--unit", "row"], 2, ["--unit", "head, group"]),
    "cache_too_long": (["export", "llama", *OUT, "--static-cache", "9999"], 2, ["--static-cache", "256"]),
    "check_missing": (["check", "none.onnx", "--against", "llama"], 3, ["no such file", "none.onnx"]),
    "check_broken": (["check", "exists.onnx", "--against", "llama"], 2, ["exists.onnx"]),
}  # fmt: skip
USAGE = {
    "no_output": (["export", "llama"], "--output"),
    "unknown_option": (["export", "llama", *OUT, "--tiles", "3"], "--tiles"),
    "unknown_command": (["exprot"], "exprot"),
    "no_tokens": (["export", "llama", *OUT, "--tokens", "0"], "--tokens"),
    "old_opset": (["export", "llama", *OUT, "--opset", "17"], "--opset"),
    "nothing_to_check_against": (["check", "exists.onnx"], "--against"),
    "no_peer_for_decode": (["bench", "kernels", "--decode", "--flashinfer", "module.so"], "--flashinfer"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, work: Path, command_line: CommandLine) -> None:
    """One message that says what, where and how to fix it; no traceback; every file as it was, and none more."""
    arguments, code, said = MISTAKES[mistake]
    before = listing(work)
    done = command_line(*arguments, directory=work)
    assert done.code == code, done.err
    assert "Traceback" not in done.err + done.out and not done.out
    (message,) = re.findall(r"^error: .*(?:\n  .*)*", done.err, flags=re.M)
    for part in said:
        assert part in message, message
    assert re.search(r"^  fix: ", message, flags=re.M), message
    assert listing(work) == before


@pytest.mark.parametrize("mistake", USAGE)
def test_usage(mistake: str, work: Path, command_line: CommandLine) -> None:
    arguments, said = USAGE[mistake]
    before = listing(work)
    done = command_line(*arguments, directory=work)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err and not done.out
    assert listing(work) == before


def test_tensorrt_is_asked_for_before_any_work(work: Path, command_line: CommandLine) -> None:
    import importlib.util

    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed, so nothing is missing")
    before = listing(work)
    done = command_line("export", "llama", "-o", "out.engine", directory=work)
    assert done.code == 3 and "tensorrt" in done.err.lower() and "fix:" in done.err and "Traceback" not in done.err
    assert listing(work) == before


def exported_by(command_line: CommandLine, work: Path, *more: str) -> Done:
    return command_line("export", "llama", "-o", "out/m.onnx", *SETTINGS, "--tokens", "70", *more, directory=work)


def test_export_and_check(work: Path, command_line: CommandLine) -> None:
    """Written, checked, reported; then checked again; then tampered with, which the check finds."""
    done = exported_by(command_line, work, "--report", "out/report.json")
    assert done.code == 0, done.err
    assert re.fullmatch(r"PASSED 2 layers, \d+ of 684 tiles skipped .*", done.last_line) or "PASSED" in done.last_line
    assert "wrote out/m.onnx: 2 attention nodes" in done.out
    files = {path.name for path in (work / "out").iterdir()}
    assert files == {"m.onnx", "m.onnx.data", "config.json", "generation_config.json", "report.json"}
    report = json.loads((work / "out" / "report.json").read_text())
    assert report["passed"] and report["skipped"] > 100 and len(report["layers"]) == 2

    again = command_line("check", "out/m.onnx", "--against", "llama", "--tokens", "70", directory=work)
    assert again.code == 0 and again.last_line == done.last_line
    as_json = command_line("check", "out/m.onnx", "--against", "llama", "--tokens", "70", "--json", directory=work)
    assert as_json.code == 0 and json.loads(as_json.out)["skipped"] == report["skipped"]

    nothing = command_line("check", "out/m.onnx", "--against", "llama", "--tokens", "4", directory=work)
    assert nothing.code == 0 and "no tile was skipped" in nothing.out

    model = onnx.load(work / "out" / "m.onnx")
    head = [one for one in model.graph.initializer if len(one.dims) == 2][-1]
    array = onnx.numpy_helper.to_array(head).copy()
    array.flat[3] += 0.5
    head.CopyFrom(onnx.numpy_helper.from_array(array, head.name))
    onnx.save(model, work / "out" / "weight.onnx")
    failed = command_line("check", "out/weight.onnx", "--against", "llama", "--tokens", "70", "--report", "r.json",
                          directory=work)  # fmt: skip
    assert failed.code == 1 and failed.last_line.startswith("FAILED 1 of 3: logits; "), failed.out
    assert json.loads((work / "r.json").read_text())["passed"] is False

    node = next(one for one in model.graph.node if one.domain == "blockskip")
    next(one for one in node.attribute if one.name == "prefill_threshold").f = 0.5
    onnx.save(model, work / "out" / "threshold.onnx")
    failed = command_line("check", "out/threshold.onnx", "--against", "llama", "--tokens", "70", directory=work)
    assert failed.code == 1 and "prefill_threshold is 0.5" in failed.err and "Traceback" not in failed.err


def test_json_is_all_of_standard_output(work: Path, command_line: CommandLine) -> None:
    done = exported_by(command_line, work, "--json", "--force", "--no-check", "--tunable", "--counts")
    assert done.code == 0, done.err
    told: dict[str, Any] = json.loads(done.out)
    assert told["nodes"] == 2 and told["check"] is None and set(told["seconds"]) == {"trace", "finish", "save"}
    graph = onnx.load(work / "out" / "m.onnx", load_external_data=False).graph
    assert [one.name for one in graph.input] == ["input_ids", "threshold_scale"]
    assert [one.name for one in graph.output] == ["logits", "tile_counts"]


def test_dry_run_writes_nothing(work: Path, command_line: CommandLine) -> None:
    before = listing(work)
    done = command_line("export", "llama", *OUT, "-c", "good.yaml", "--dry-run", directory=work)
    assert done.code == 0 and "model.layers.1.self_attn" in done.out and "0.7" in done.out and "4 x 4" in done.out
    done = command_line("export", "llama", *OUT, "-c", "good.yaml", "--dry-run", "--json", directory=work)
    assert set(json.loads(done.out)) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert listing(work) == before


def test_schema_and_doctor(work: Path, command_line: CommandLine) -> None:
    schema = command_line("schema", directory=work)
    assert schema.code == 0 and "sparse_cfg" in json.loads(schema.out)["properties"]
    doctor = command_line("doctor", "--json", directory=work)
    parts = {one["part"]: one for one in json.loads(doctor.out)}
    assert doctor.code == 0 and parts["torch"]["there"] and parts["onnxruntime"]["there"]
    assert all(one["there"] or one["fix"] for one in parts.values())


def test_help_names_every_command(work: Path, command_line: CommandLine) -> None:
    done = command_line("--help", directory=work)
    assert done.code == 0
    for command in ("export", "check", "demo", "doctor", "schema"):
        assert command in done.out
        assert command_line(command, "--help", directory=work).code == 0


def test_interrupted(work: Path) -> None:
    """Ctrl-C while the model is traced: 130, a word about it, and nothing left. A process of its own, as a shell's."""
    before = listing(work)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "export", "llama", "-o", "new.onnx", *SETTINGS], cwd=work,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # in the background of a shell Ctrl-C is ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "tracing" in line:
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err and not out
    assert listing(work) == before


SWALLOWED = """
import os, signal, time
import export.cli

def app():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        raise TypeError("a tracer made this of it")

signal.signal(signal.SIGINT, signal.default_int_handler)
export.cli.app = app
export.cli.main()
"""


def test_an_interrupt_that_comes_out_as_another_exception_is_one() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr and "TypeError" not in done.stderr
