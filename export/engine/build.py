"""From an exported `.onnx` to a TensorRT engine in which every block-skip node is the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from export.engine.gpu import require_gpu, use_gpu
from export.engine.kernel_check import require_kernels
from export.engine.model import ExportedModel, read_model
from export.engine.options import HARDWARE, EngineOptions
from export.engine.plugin import PluginLibrary, check_tensorrt, find_plugin, load_plugin, sha256_of
from export.engine.prepare import prepare
from export.engine.progress import Interruption, PhaseBars, make_monitor
from export.engine.shapes import Profile, make_profiles, parse_shapes
from export.engine.sidecar import Sidecar, current_gpu, require_engine_suffix, sidecar_path, write_sidecar
from export.engine.tensorrt_api import explain, import_tensorrt, major_of, make_logger
from export.engine.trtexec import trtexec_command
from export.save import check_output, staged
from sparse_attention.errors import ModelError


@dataclass(frozen=True)
class EngineReport:
    """What was built: the engine and its record, the plugin nodes in it, the profiles, how to build it by hand."""

    path: Path
    sidecar: Path
    bytes: int
    nodes: int
    profiles: tuple[Profile, ...]
    command: str | None
    notes: tuple[str, ...] = ()


def require_tensorrt(options: EngineOptions | None = None) -> None:
    """Raises MissingError where TensorRT, the plugin library or a GPU lacks: before a model is exported for nothing."""
    check_tensorrt(find_plugin((options or EngineOptions()).plugin), import_tensorrt().__version__)
    require_gpu(use_gpu())


def build_engine(
    onnx: Path,
    path: Path,
    *,
    options: EngineOptions | None = None,
    force: bool = False,
    console: Console | None = None,
) -> EngineReport:
    """Builds `path` and its record `path.json` from an exported model; both appear together, or neither does.

    Everything that would make the engine useless is looked for before the build: the op's version, types, shapes,
    kernels for every node at every profile, and that TensorRT's parser bound every node to the plugin.
    `force` overwrites what is there. Raises MissingError (no TensorRT, GPU, plugin library or memory), UsageError or
    ModelError (a model or shapes that cannot be built), KeyboardInterrupt after Ctrl-C.
    """
    options = options or EngineOptions()
    console = console or Console(stderr=True)
    require_engine_suffix(path)
    check_output(path, force=force)
    model = read_model(onnx)
    profiles = make_profiles(model.inputs, parse_shapes(options.shapes), max_length=options.max_length)
    prepared = prepare(model)
    plugin = find_plugin(options.plugin)
    no_gpu = use_gpu()
    require_kernels(model, profiles, plugin)
    tensorrt = import_tensorrt()
    check_tensorrt(plugin, tensorrt.__version__)
    require_gpu(no_gpu)
    command = trtexec_command(onnx, path, profiles, options, plugin.path, major_of(tensorrt))
    console.print("The same by hand:", command, soft_wrap=True, markup=False, highlight=False)
    for change in prepared.changes:
        console.print(f"Note: {change}; trtexec would need the same change.", markup=False)

    logger = make_logger(tensorrt, verbose=options.verbose)
    builder = _create(lambda: tensorrt.Builder(logger), logger, "TensorRT's builder did not start.", str(onnx))
    load_plugin(builder.get_plugin_registry(), plugin, logger.errors)
    network = parse(tensorrt, builder, logger, prepared.proto.SerializeToString(), onnx)
    _require_plugin_layers(tensorrt, network, model)
    config = configure(tensorrt, builder, network, profiles, options, plugin)
    engine = run_build(tensorrt, builder, network, config, logger, console, where=str(onnx))
    record = Sidecar(
        "tensorrt", tensorrt.__version__, sha256(engine).hexdigest(), len(engine), current_gpu(),
        {"sha256": plugin.sha256, "tensorrt_headers": plugin.tensorrt_headers, "kernels": plugin.kernels},
        describe_profiles(profiles), options.as_json(), model.recorded.get("config"), model.exported, sha256_of(onnx),
        len(model.nodes),
    )  # fmt: skip
    save(path, engine, record)
    save_timing_cache(config, options)
    return EngineReport(path, sidecar_path(path), len(engine), len(model.nodes), profiles, command, prepared.changes)


def parse(tensorrt: ModuleType, builder: Any, logger: Any, model: bytes, path: Path) -> Any:
    """A strongly typed network; raises ModelError with the parser's own errors and the node they are about."""
    flags = tensorrt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = tensorrt.OnnxParser(network, logger)
    # The path is where the parser finds weights stored beside the model; relative ones start there.
    if not parser.parse(model, str(path.resolve())):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        where = ", ".join(dict.fromkeys(e.node_name() for e in errors if e.node_name())) or str(path)
        raise ModelError(
            "TensorRT's parser does not take the model.", where=where,
            found="; ".join(e.desc() for e in errors[:3]) or "; ".join(logger.errors[:3]),
            fix="Export the model again, if you like with an older --opset (18).",
        )  # fmt: skip
    return network


def configure(
    tensorrt: ModuleType,
    builder: Any,
    network: Any,
    profiles: Sequence[Profile],
    options: EngineOptions,
    plugin: PluginLibrary | None,
) -> Any:
    """TensorRT's builder configuration for these options, with one optimisation profile per phase."""
    config = builder.create_builder_config()
    for profile in profiles:
        wanted = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            wanted.set_shape(name, *profile.inputs[name])
        config.add_optimization_profile(wanted)
    if options.workspace_gib is not None:
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * (1 << 30)))
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT": options.refit,
        "WEIGHT_STREAMING": options.weight_streaming,
    }
    for name, wanted_flag in flags.items():
        if wanted_flag:
            config.set_flag(getattr(tensorrt.BuilderFlag, name))
    config.hardware_compatibility_level = getattr(
        tensorrt.HardwareCompatibilityLevel, HARDWARE[options.hardware_compatibility]
    )
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.plugin_placement == "embedded" and plugin is not None:
        config.plugins_to_serialize = [str(plugin.path)]
    if options.timing_cache is not None:
        known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        # A cache of another GPU or version is not used; TensorRT says so and starts an empty one.
        if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return config


def run_build(
    tensorrt: ModuleType, builder: Any, network: Any, config: Any, logger: Any, console: Console, *, where: str
) -> bytes:
    """The serialised engine; progress on the console. Raises MissingError with the cause, KeyboardInterrupt."""
    interruption = Interruption()
    with PhaseBars(console) as bars, interruption.watch():
        monitor = make_monitor(tensorrt, bars, interruption)
        config.progress_monitor = monitor
        serialised = builder.build_serialized_network(network, config)
    if interruption.requested:
        raise KeyboardInterrupt
    if serialised is None:
        raise explain(logger.errors, "TensorRT could not build the engine.", where)
    return bytes(serialised)


def save(path: Path, engine: bytes, record: Sidecar) -> None:
    """Writes engine and record completely, then gives both their names."""
    with staged(path) as folder:
        (folder / path.name).write_bytes(engine)
        write_sidecar(sidecar_path(folder / path.name), record)


def save_timing_cache(config: Any, options: EngineOptions) -> None:
    cache = config.get_timing_cache()
    if options.timing_cache is not None and cache is not None:
        options.timing_cache.parent.mkdir(parents=True, exist_ok=True)
        with staged(options.timing_cache) as folder:
            (folder / options.timing_cache.name).write_bytes(bytes(cache.serialize()))


def describe_profiles(profiles: Sequence[Profile]) -> dict[str, Any]:
    return {p.name: {name: [list(s) for s in shapes] for name, shapes in p.inputs.items()} for p in profiles}


def _create(make: Any, logger: Any, otherwise: str, where: str) -> Any:
    """TensorRT's factories return nothing where they fail, which its binding reports as a TypeError."""
    try:
        return make()
    except TypeError as error:
        raise explain(logger.errors, otherwise, where) from error


def _require_plugin_layers(tensorrt: ModuleType, network: Any, model: ExportedModel) -> None:
    kind = tensorrt.LayerType.PLUGIN_V3
    found = sum(network.get_layer(i).type == kind for i in range(network.num_layers))
    if found < len(model.nodes):
        raise ModelError(
            "TensorRT's parser did not bind every block-skip node to the plugin.", where=str(model.path),
            found=f"{found} plugin layers for {len(model.nodes)} nodes",
            fix="Export the model again; if it stays, report it with the versions of TensorRT and this package.",
        )  # fmt: skip
