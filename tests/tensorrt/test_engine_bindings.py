"""The engine-building code on the real TensorRT 11 Python API, in processes of their own.

The binding runs on TensorRT-RTX's libraries, which have no plugin layers: what is built here is the portable model, by
the functions that `build_engine` is made of. Plugin layers in a real TensorRT are not covered by any test here.
"""

from __future__ import annotations

import json
from pathlib import Path

from tensorrt_models import SHAPES, attention_model
from tensorrt_support import Run

BUILD = r"""
import io, json, sys
from hashlib import sha256
from pathlib import Path
from rich.console import Console
from export.engine import build
from export.engine.model import read_model
from export.engine.options import EngineOptions
from export.engine.progress import PhaseBars
from export.engine.shapes import make_profiles, parse_shapes
from export.engine.sidecar import Sidecar, check_file, read_sidecar
from export.engine.tensorrt_api import import_tensorrt, major_of, make_logger

onnx, path, cache = map(Path, sys.argv[1:4])
tensorrt = import_tensorrt()
assert major_of(tensorrt) == 11, tensorrt.__version__
options = EngineOptions(
    shapes=("sequence:1,64,256", "decode.past:1,127,255"), workspace_gib=float(sys.argv[4]), timing_cache=cache,
    hardware_compatibility="ampere+", optimization_level=1,
)
model = read_model(onnx)
profiles = make_profiles(model.inputs, parse_shapes(options.shapes))
logger = make_logger(tensorrt)
builder = tensorrt.Builder(logger)
network = build.parse(tensorrt, builder, logger, model.proto.SerializeToString(), onnx)
config = build.configure(tensorrt, builder, network, profiles, options, None)
# Without a GPU a refittable engine cannot be built; that the flags arrive is seen on a second configuration.
flags = build.configure(tensorrt, builder, network, profiles, EngineOptions(refit=True, weight_streaming=True), None)
phases = []
start = PhaseBars.start
PhaseBars.start = lambda self, *given: (phases.append(given[0]), start(self, *given))[1]
console = Console(file=io.StringIO())
engine = build.run_build(tensorrt, builder, network, config, logger, console, where=str(onnx))
record = Sidecar("tensorrt", tensorrt.__version__, sha256(engine).hexdigest(), len(engine), None, None,
                 build.describe_profiles(profiles), options.as_json(), None, model.exported, "", len(model.nodes))
build.save(path, engine, record)
build.save_timing_cache(config, options)
check_file(path, read_sidecar(path))
print(json.dumps({
    "profiles": config.num_optimization_profiles, "phases": phases, "bytes": len(engine),
    "workspace": config.get_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE),
    "flags": [flags.get_flag(getattr(tensorrt.BuilderFlag, f)) for f in ("REFIT", "WEIGHT_STREAMING")],
    "level": config.builder_optimization_level,
    "files": sorted(p.name for p in path.parent.iterdir()),
}))
"""


def test_builds_with_profiles_cache_progress_and_record(run_bindings: Run, tmp_path: Path) -> None:
    onnx = attention_model(tmp_path / "m.onnx")
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):  # the second build reads the timing cache of the first
        result = run_bindings(BUILD, onnx, out / "m.engine", out / "cache.bin", "1")
        assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["profiles"] == 2
    assert "Building engine" in found["phases"]
    assert found["bytes"] > 0
    assert found["workspace"] == 1 << 30
    assert found["flags"] == [True, True]
    assert found["level"] == 1
    assert found["files"] == ["cache.bin", "m.engine", "m.engine.json"], "nothing half-written stays"


def test_not_enough_memory_says_so_and_writes_nothing(run_bindings: Run, tmp_path: Path) -> None:
    wide = {name: ("batch", 64, *SHAPES[name][2:]) for name in ("q", "k", "v")}
    onnx = attention_model(tmp_path / "m.onnx", shapes=wide)
    out = tmp_path / "out"
    out.mkdir()
    result = run_bindings(BUILD, onnx, out / "m.engine", out / "cache.bin", "0.05")
    assert result.returncode == 1
    assert "MissingError: There is not enough memory for the engine." in result.stderr
    assert "--workspace" in result.stderr
    assert not list(out.iterdir())


INTERRUPT = r"""
import io, os, signal, sys
from pathlib import Path
from rich.console import Console
from export.engine import build
from export.engine.model import read_model
from export.engine.options import EngineOptions
from export.engine.progress import PhaseBars
from export.engine.shapes import make_profiles
from export.engine.tensorrt_api import import_tensorrt, make_logger

onnx = Path(sys.argv[1])
tensorrt = import_tensorrt()
model, logger = read_model(onnx), make_logger(tensorrt)
builder = tensorrt.Builder(logger)
network = build.parse(tensorrt, builder, logger, model.proto.SerializeToString(), onnx)
config = build.configure(tensorrt, builder, network, make_profiles(model.inputs, {}), EngineOptions(), None)
before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a shell
steps = []
def advance(self, phase, step):
    steps.append(phase)
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C in the middle of the build
PhaseBars.advance = advance
try:
    build.run_build(tensorrt, builder, network, config, logger, Console(file=io.StringIO()), where="")
except KeyboardInterrupt:
    print("interrupted after", len(steps), signal.getsignal(signal.SIGINT) is before)
"""


def test_ctrl_c_ends_the_build_and_gives_the_signal_back(run_bindings: Run, tmp_path: Path) -> None:
    result = run_bindings(INTERRUPT, attention_model(tmp_path / "m.onnx"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("interrupted after")
    assert result.stdout.split()[-1] == "True"


ERRORS = r"""
import sys
from pathlib import Path
import onnx
from onnx import helper
from export.engine import build
from export.engine.load import load_engine
from export.engine.sidecar import Sidecar, write_sidecar, sidecar_path
from export.engine.tensorrt_api import explain, import_tensorrt, make_logger
from sparse_attention.errors import SparseAttentionError

folder = Path(sys.argv[1])
tensorrt = import_tensorrt()

def said(action):
    try:
        action()
    except SparseAttentionError as error:
        print(error.exit_code, str(error).replace("\n", " "))
    else:
        print("no error")

# an operator that TensorRT does not have
value = helper.make_tensor_value_info
graph = helper.make_graph([helper.make_node("Unheard", ["x"], ["y"], "strange", domain="nowhere")], "g",
                          [value("x", 10, (2,))], [value("y", 10, (2,))])
opsets = [helper.make_opsetid("", 18), helper.make_opsetid("nowhere", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
logger = make_logger(tensorrt)
builder = tensorrt.Builder(logger)
said(lambda: build.parse(tensorrt, builder, logger, model.SerializeToString(), folder / "m.onnx"))

# bytes that are no engine
runtime_logger = make_logger(tensorrt)
runtime = tensorrt.Runtime(runtime_logger)
engine = runtime.deserialize_cuda_engine(b"this is not an engine" * 100)
assert engine is None
print(explain(runtime_logger.errors, "TensorRT could not load the engine.", "x.engine"))

# a whole engine on a machine without a GPU
path = folder / "e.engine"
path.write_bytes(b"engine")
from hashlib import sha256
record = Sidecar("tensorrt", tensorrt.__version__, sha256(b"engine").hexdigest(), 6, None, None, {},
                 {"version_compatible": False, "plugin_placement": "beside", "hardware_compatibility": "none"},
                 None, {}, "", 1)
write_sidecar(sidecar_path(path), record)
said(lambda: load_engine(path))
"""


def test_errors_name_cause_and_fix(run_bindings: Run, tmp_path: Path) -> None:
    result = run_bindings(ERRORS, tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "TensorRT's parser does not take the model" in lines[0]
    assert "strange" in lines[0]
    assert any("damaged" in line or "could not load the engine" in line for line in lines[1:])
    import torch

    if not torch.cuda.is_available():
        assert lines[-1].startswith("3 An engine runs on a GPU, and there is none.")


WITHOUT_GPU = r"""
import sys
from pathlib import Path
from export.engine import EngineOptions, build_engine, require_tensorrt
from sparse_attention.errors import SparseAttentionError

onnx, out, plugin = map(Path, sys.argv[1:4])
for options, model in (
    (EngineOptions(plugin=plugin / "none.so"), onnx),
    (EngineOptions(plugin=Path(sys.argv[4])), onnx),
    (EngineOptions(shapes=("tokens:1",)), onnx),
):
    try:
        build_engine(model, out, options=options)
    except SparseAttentionError as error:
        print(error.exit_code, str(error).replace("\n", " "))
assert not list(out.parent.iterdir()), "something was written"
"""


def test_nothing_long_starts_without_what_it_needs(run_bindings: Run, tmp_path: Path) -> None:
    onnx = attention_model(tmp_path / "m.onnx")
    out = tmp_path / "out"
    out.mkdir()
    text = tmp_path / "text.so"
    text.write_text("no library")
    result = run_bindings(WITHOUT_GPU, onnx, out / "m.engine", tmp_path, text)
    assert result.returncode == 0, result.stderr
    missing, unloadable, unknown = result.stdout.splitlines()
    assert missing.startswith("3 The TensorRT plugin is not built.")
    assert "cmake -S plugins -B build" in missing
    assert unloadable.startswith("3 The plugin library cannot be loaded.")
    assert unknown.startswith("2 --shapes names a dimension that the model does not have.")
