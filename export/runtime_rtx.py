"""TensorRT-RTX: an engine from the op's function body. Portable, buildable without a GPU, not accelerated.

TensorRT-RTX has no plugin layers, so nothing is skipped in such an engine: every node is computed by the standard
operators of its function body, which hold the whole score matrix.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from rich.console import Console

from export import op
from export.engine.build import EngineReport, configure, describe_profiles, parse, run_build, save, save_timing_cache
from export.engine.model import ExportedModel, read_model
from export.engine.options import EngineOptions
from export.engine.plugin import sha256_of
from export.engine.shapes import make_profiles, parse_shapes
from export.engine.sidecar import Sidecar, current_gpu, require_engine_suffix, sidecar_path
from export.engine.tensorrt_api import import_tensorrt_rtx, make_logger
from export.save import check_output
from sparse_attention.errors import UsageError

NOT_ACCELERATED = (
    "This engine is portable, not accelerated: TensorRT-RTX has no plugins, so each block-skip node runs as its "
    "function body in standard operators. It decides the same tiles, and saves no time by it."
)


def build_portable_engine(
    onnx: Path,
    path: Path,
    *,
    options: EngineOptions | None = None,
    force: bool = False,
    console: Console | None = None,
) -> EngineReport:
    """Builds a TensorRT-RTX engine and its record; the report's notes say that it is not accelerated.

    `force` overwrites what is there. Raises MissingError where tensorrt-rtx is not installed, UsageError where the
    output exists or the model has no function body.
    """
    options = options or EngineOptions()
    console = console or Console(stderr=True)
    require_engine_suffix(path)
    check_output(path, force=force)
    model = read_model(onnx)
    _require_body(model)
    profiles = make_profiles(model.inputs, parse_shapes(options.shapes), max_length=options.max_length)
    tensorrt = import_tensorrt_rtx()
    console.print(NOT_ACCELERATED, markup=False)
    logger = make_logger(tensorrt, verbose=options.verbose)
    builder = tensorrt.Builder(logger)
    network = parse(tensorrt, builder, logger, model.proto.SerializeToString(), onnx)
    config = configure(tensorrt, builder, network, profiles, options, None)
    engine = run_build(tensorrt, builder, network, config, logger, console, where=str(onnx))
    record = Sidecar(
        "tensorrt-rtx", tensorrt.__version__, sha256(engine).hexdigest(), len(engine), current_gpu(), None,
        describe_profiles(profiles), options.as_json(), model.recorded.get("config"), model.exported, sha256_of(onnx),
        len(model.nodes),
    )  # fmt: skip
    save(path, engine, record)
    save_timing_cache(config, options)
    return EngineReport(
        path, sidecar_path(path), len(engine), len(model.nodes), profiles, None, (NOT_ACCELERATED,)
    )  # fmt: skip


def _require_body(model: ExportedModel) -> None:
    if not any((f.domain, f.name) == (op.DOMAIN, op.OP_TYPE) for f in model.proto.functions):
        raise UsageError(
            "The model carries no function body of the op, which is all that TensorRT-RTX can run.",
            where=str(model.path), fix="Export the model again with this package.",
        )  # fmt: skip
