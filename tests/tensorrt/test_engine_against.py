"""An engine against the PyTorch model or the .onnx it came from: what is run, what is compared, what is told.

An engine only loads on a GPU. Everything before and after is the real thing: the exported file, the record that the
builder wrote, TensorRT 11's own description of the inputs, PyTorch's outputs, the command line. In the engine's place
stands the file it was built from, in ONNX Runtime, within the profiles that the record has.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from filelock import FileLock
from tensorrt_support import Run
from torch import Tensor
from typer.testing import CliRunner, Result

from export.cli import app
from export.engine import against_model, check, check_engine
from export.engine.against import as_tensors
from export.engine.build import describe_profiles
from export.engine.inputs import example_inputs
from export.engine.model import TensorInfo, read_model
from export.engine.shapes import make_profiles, parse_shapes
from export.engine.sidecar import Sidecar, check_file, read_sidecar
from export.models import LoadedModel, load_model
from export.runners import as_numpy, session
from sparse_attention import layers_of
from sparse_attention.errors import MissingError, UsageError
from tests.conftest import Exported

TOKENS, LONGEST = 70, 96
CACHED = {"kv_cache": True, "counts": True, "tunable": True}

BUILD = r"""
import sys
from pathlib import Path
from export.engine import EngineOptions
from export.runtime_rtx import build_portable_engine
build_portable_engine(Path(sys.argv[1]), Path(sys.argv[2]), options=EngineOptions(max_length=int(sys.argv[3])))
"""


class FileAsEngine:
    """Stands in for the runner of an engine: the .onnx in ONNX Runtime, refusing what the profile does not span."""

    def __init__(self, loaded: Any, profile: str) -> None:
        self._session = session(str(loaded.onnx))
        self._recorded = loaded.sidecar.profiles[profile]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert set(inputs) == set(self._recorded)
        for name, (low, _, high) in self._recorded.items():
            sizes = zip(low, inputs[name].shape, high, strict=True)
            assert all(a <= size <= b for a, size, b in sizes), f"{name} {tuple(inputs[name].shape)}"
        names = [output.name for output in self._session.get_outputs()]
        values = self._session.run(names, {name: as_numpy(value) for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    def milliseconds(self, inputs: Mapping[str, Tensor]) -> float:
        return 1.25


Built = Callable[..., Path]


@pytest.fixture
def built(
    exported: Callable[..., Exported],
    run_rtx: Run,
    shared_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Built:
    """An engine of the tiny Llama; the file it was built from takes its place when it is run."""

    def load(path: Path, *, plugin: Path | None = None) -> Any:
        sidecar = read_sidecar(path)
        check_file(path, sidecar)
        return SimpleNamespace(sidecar=sidecar, onnx=path.with_suffix(".onnx"))

    monkeypatch.setattr(check, "load_engine", load)
    monkeypatch.setattr(check, "EngineRunner", FileAsEngine)

    def build(**options: Any) -> Path:
        source = exported("llama", dtype="float16", **options).path
        folder = shared_folder / f"engine-{source.parent.name}"
        new = folder.with_name(f"new-{folder.name}")
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                result = run_rtx(BUILD, source, new / "model.engine", str(LONGEST))
                assert result.returncode == 0, result.stderr[-2000:]
                for file in source.parent.iterdir():
                    shutil.copy(file, new)
                new.rename(folder)
        return Path(shutil.copytree(folder, tmp_path / folder.name)) / "model.engine"

    return build


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def tamper(engine: Path) -> None:
    """Another weight in what stands for the engine."""
    path = engine.with_suffix(".onnx")
    model = onnx.load(path)
    weight = [one for one in model.graph.initializer if len(one.dims) == 2][-1]
    array = onnx.numpy_helper.to_array(weight).copy()
    array.flat[3] += 2
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)


def test_against_the_model_both_phases_and_the_tiles(built: Built, llama_directory: Path, tmp_path: Path) -> None:
    engine = built(**CACHED)
    report = tmp_path / "report.json"
    done = command(engine, "--against", llama_directory, "--tokens", TOKENS, "--report", report)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].startswith("PASSED 12 outputs")  # logits, four of the cache, counts; twice
    assert "prefill: 1.250 ms a run" in done.output
    told = json.loads(report.read_text())
    tiles = {one["profile"]: one["tiles"] for one in told["outputs"] if one["output"] == "tile_counts"}
    assert set(tiles) == {"prefill", "decode"}
    assert all(0 < expected < total for _, expected, total in tiles.values()), tiles
    assert told["notes"] == []

    tamper(engine)
    failed = command(engine, "--against", llama_directory, "--tokens", TOKENS, "--json")
    assert failed.exit_code == 1
    wrong = [one["output"] for one in json.loads(failed.stdout)["outputs"] if not one["passed"]]
    assert "logits" in wrong


def test_against_the_file(built: Built) -> None:
    engine = built(**CACHED)
    done = command(engine, "--against", engine.with_suffix(".onnx"), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [one["error"] for one in told["outputs"]] == [0.0] * 12, "the same file on the same inputs"


def test_without_counts_it_says_so(built: Built, llama_directory: Path) -> None:
    engine = built()
    done = command(engine, "--against", llama_directory, "--tokens", TOKENS)
    assert done.exit_code == 0, done.output
    assert "export with --counts" in done.output
    assert "decode" not in done.output


def test_a_short_text_skips_nothing_and_that_is_told(built: Built, llama_directory: Path) -> None:
    done = command(built(**CACHED), "--against", llama_directory, "--tokens", 3)
    assert done.exit_code == 0, done.output
    assert "no tile was skipped" in done.output


@pytest.mark.parametrize(
    ("shapes", "tokens", "batch", "length"),
    [
        ((), 2048, 1, LONGEST - 1),  # one place of the cache is left for the decode step
        (("batch:2,2,3",), 20, 2, 20),
        (("sequence:40,50,60",), 8, 1, 40),
        (("decode.past:1,10,30",), 50, 1, 30),
    ],
)
def test_the_text_fits_the_profiles(
    built: Built, llama_directory: Path, shapes: tuple[str, ...], tokens: int, batch: int, length: int
) -> None:
    engine = built(**CACHED)
    inputs = read_model(engine.with_suffix(".onnx")).inputs
    profiles = describe_profiles(make_profiles(inputs, parse_shapes(shapes), max_length=LONGEST))
    sidecar = Sidecar(**(vars(read_sidecar(engine)) | {"profiles": profiles}))
    cases = against_model(lambda dtype: load_model(str(llama_directory), dtype=dtype), tokens)
    prefill, decode = cases(sidecar)
    assert prefill.inputs["input_ids"].shape == (batch, length)
    assert decode.inputs["input_ids"].shape == (batch, 1)
    assert decode.inputs["past_key_values.1.value"].shape == (batch, 2, length, 8)
    assert decode.inputs["past_key_values.1.value"].dtype == torch.float16, "in the engine's dtype"


def test_a_preallocated_cache(built: Built, llama_directory: Path) -> None:
    engine = built(static_cache=64, kv_cache=True, counts=True)
    done = command(engine, "--against", llama_directory, "--tokens", 200, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {one["profile"] for one in told["outputs"]} == {"prefill", "decode"}
    assert sum(one["tiles"][0] for one in told["outputs"] if one["tiles"]) > 0


def test_the_model_is_left_as_it_was_and_loaded_last(built: Built, exported: Callable[..., Exported]) -> None:
    engine = built(**CACHED)
    model = exported("llama", dtype="float16", **CACHED).dense()
    asked = []

    def load(dtype: str) -> LoadedModel:
        asked.append(dtype)
        return LoadedModel(model, None, "tiny")

    assert check_engine(engine, against_model(load, TOKENS)).passed
    assert asked == ["float16"]
    assert not layers_of(model)


def mistaken(sidecar: Sidecar, llama: Exported, **changes: Any) -> str:
    changed = Sidecar(**(vars(sidecar) | changes))
    with pytest.raises(UsageError) as error:
        list(against_model(lambda _: LoadedModel(llama.dense(), None, "tiny"), TOKENS)(changed))
    assert error.value.fix
    return str(error.value)


def test_what_does_not_belong_together(built: Built, exported: Callable[..., Exported]) -> None:
    sidecar, llama = read_sidecar(built(**CACHED)), exported("llama", dtype="float16", **CACHED)
    assert "how its model was sparsified" in mistaken(sidecar, llama, configuration=None)
    without_cache = sidecar.exported | {"signature": {"padding": "none"}}
    assert "different inputs" in mistaken(sidecar, llama, exported=without_cache)
    longer = sidecar.profiles | {"decode": sidecar.profiles["prefill"]}
    assert "No text fits" in mistaken(sidecar, llama, profiles=longer)


def test_an_output_that_the_model_does_not_have_is_an_error(built: Built, exported: Callable[..., Exported]) -> None:
    engine = built(**CACHED)
    other = exported("llama", dtype="float16", kv_cache=True, tunable=True).path
    with pytest.raises(UsageError, match="does not have") as error:
        check_engine(engine, other)
    assert "tile_counts" in str(error.value)


def test_too_little_memory_to_run_it(built: Built, llama_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: FileAsEngine, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(FileAsEngine, "__call__", full)
    with pytest.raises(MissingError, match="not enough memory") as error:
        check_engine(
            built(**CACHED), against_model(lambda dtype: load_model(str(llama_directory), dtype=dtype), TOKENS)
        )
    assert "20.00 GiB" in error.value.found


def test_bfloat16_examples_are_tensors() -> None:
    arrays = example_inputs([TensorInfo("x", onnx.TensorProto.BFLOAT16, (2, 3))], {"x": (2, 3)})
    tensor = as_tensors(arrays)["x"]
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor.float(), torch.from_numpy(arrays["x"].astype("float32")))


WITH_TENSORRT = r"""
import io, sys
from hashlib import sha256
from pathlib import Path
import torch
from rich.console import Console
from export.engine import EngineOptions, against_model, build, load, load_engine
from export.engine.model import read_model
from export.engine.shapes import make_profiles
from export.engine.sidecar import Gpu, Sidecar, read_sidecar
from export.engine.tensorrt_api import import_tensorrt, make_logger
from export.models import load_model
from sparse_attention.errors import SparseAttentionError

onnx, engine, source = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
tensorrt, options = import_tensorrt(), EngineOptions()
model, logger = read_model(onnx), make_logger(tensorrt)
profiles = make_profiles(model.inputs, {}, max_length=96)
builder = tensorrt.Builder(logger)
network = build.parse(tensorrt, builder, logger, model.proto.SerializeToString(), onnx)
config = build.configure(tensorrt, builder, network, profiles, options, None)
plan = build.run_build(tensorrt, builder, network, config, logger, Console(file=io.StringIO()), where="")
build.save(engine, plan, Sidecar("tensorrt", tensorrt.__version__, sha256(plan).hexdigest(), len(plan), None, None,
    build.describe_profiles(profiles), options.as_json(), model.recorded["config"], model.exported, "", 2))
types = {torch.float16: "HALF", torch.float32: "FLOAT", torch.int64: "INT64", torch.int32: "INT32"}
for case in against_model(lambda dtype: load_model(source, dtype=dtype), 70)(read_sidecar(engine)):
    tensors = {"in": [network.get_input(i) for i in range(network.num_inputs)],
               "out": [network.get_output(i) for i in range(network.num_outputs)]}
    for given, wanted in ((case.inputs, tensors["in"]), (case.expected, tensors["out"])):
        assert set(given) == {tensor.name for tensor in wanted}, (set(given), case.profile)
        for tensor in wanted:
            assert getattr(tensorrt.DataType, types[given[tensor.name].dtype]) == tensor.dtype, tensor.name
            assert len(tensor.shape) == given[tensor.name].dim()
            sizes = zip(tensor.shape, given[tensor.name].shape)
            assert all(fixed in (-1, size) for fixed, size in sizes), tensor.name
    print(case.profile, len(case.inputs), len(case.expected))
load.current_gpu = lambda: Gpu("a card that is not there", "9.0")
try:
    load_engine(engine)
except SparseAttentionError as error:
    print(error.exit_code, error.what)
"""


def test_tensorrt_wants_what_is_given_and_gives_what_is_expected(
    run_bindings: Run, exported: Callable[..., Exported], llama_directory: Path, tmp_path: Path
) -> None:
    """Names, types and ranks of the real TensorRT 11 network; then its runtime takes the engine as far as a GPU."""
    source = exported("llama", dtype="float16", **CACHED).path
    result = run_bindings(WITH_TENSORRT, source, tmp_path / "m.engine", llama_directory)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert lines[:2] == ["prefill 7 6", "decode 7 6"]
    if not torch.cuda.is_available():
        assert lines[2] == "3 TensorRT found no usable GPU."
