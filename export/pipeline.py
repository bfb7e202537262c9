"""From a model and a configuration to a file: sparsify, trace, finish, save; `export_format` says where to stop."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import nn

from export.adapter import Dynamic, Padding, Signature
from export.engine.options import EngineOptions
from export.finish import finish, op_nodes
from export.models import LoadedModel
from export.rewrite import RewriteReport
from export.rewrite_file import read_onnx, rewrite
from export.save import check_output, save_onnx
from export.signatures import signature_from
from export.trace import trace
from sparse_attention import layers_of, load_config, restore, sparsify
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.config_io import Source
from sparse_attention.errors import UsageError

Format = Literal["onnx", "tensorrt"]
Runtime = Literal["tensorrt", "tensorrt-rtx"]
SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".engine": "tensorrt", ".plan": "tensorrt"}


@dataclass(frozen=True)
class ExportOptions:
    """How the graph is made.

    `opset` of the default ONNX domain; `padding` what an `attention_mask` input may hide; `kv_cache` makes one graph
    for prefill, chunks and decode, `static_cache` the same with so many preallocated keys; `tunable` adds the input
    `threshold_scale`; `counts` adds the output `tile_counts`; `unit` of decision, "head" or "group"; `examples` and
    `dynamic` are the inputs of a model that is not of Hugging Face.
    """

    opset: int = 23
    padding: Padding = "auto"
    kv_cache: bool = False
    static_cache: int = 0
    tunable: bool = False
    counts: bool = False
    unit: str = "head"
    examples: dict[str, Any] | None = None
    dynamic: dict[str, Dynamic] | None = None

    def signature(self, model: nn.Module) -> Signature:
        """The graph's inputs and outputs for `model`."""
        return signature_from(self.described, model, self.examples, self.dynamic)

    def with_examples(self, loaded: LoadedModel) -> ExportOptions:
        """The same options with what a loaded model says of its inputs."""
        return replace(self, examples=loaded.examples, dynamic=loaded.dynamic)

    @property
    def described(self) -> dict[str, Any]:
        """What `signature_of` needs to know again when the file is checked."""
        return {"padding": self.padding, "kv_cache": self.kv_cache, "static_cache": self.static_cache}


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote: the file, how many attention nodes it holds, seconds per step, what was rewritten."""

    path: Path
    nodes: int
    seconds: dict[str, float] = field(default_factory=dict)
    rewriting: RewriteReport | None = None


def export_onnx(
    model: nn.Module,
    config: SparseAttentionConfig | Source,
    path: Path | str,
    *,
    options: ExportOptions | None = None,
    side_files: tuple[Any, ...] = (),
    force: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Exports `model` with block-skip attention as an `.onnx` that runs anywhere.

    Every attention module that `config` matches becomes one `BlockSkipSoftmaxAttention` node with its own settings, K
    and V un-expanded and no causal mask; the op's function body lies in the file, so that ONNX Runtime runs it as is.

    Args:
        model: a Hugging Face model in eval mode (left as it was), or any module with `options.examples`.
        config: a configuration, a preset's name, a dict or a file.
        path: the `.onnx` to write; the weights go to `<name>.data` beside it.
        options: how the graph is made.
        side_files: objects with `save_pretrained(directory)` that are written beside it, such as a tokenizer.
        force: overwrite what is there.
        progress: told what is being done.

    Raises:
        UsageError: where the output exists or cannot be written.
        ConfigError: where the configuration does not fit the model.
        ModelError: where the model cannot be sparsified or exported.
    """
    path, options, config = Path(path), options or ExportOptions(), load_config(config)
    check_output(path, force=force)
    step, seconds = _stopwatch()
    was_sparse = bool(layers_of(model))
    if not was_sparse:
        sparsify(model, config, unit=options.unit)
    try:
        progress("tracing the model")
        graph = trace(options.signature(model), opset=options.opset)
        step("trace")
        settings = {layer.name: layer.settings.as_dict() for layer in layers_of(model)}
    finally:
        if not was_sparse:
            restore(model)
    progress("completing the graph")
    _finish(graph, config, settings, options)
    step("finish")
    progress("writing the file")
    save_onnx(graph, path, side_files, force=force)
    step("save")
    return ExportResult(path, len(op_nodes(graph)), seconds)


def rewrite_onnx(
    source: Path | str,
    config: SparseAttentionConfig | Source,
    path: Path | str,
    *,
    options: ExportOptions | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Rewrites the attention subgraphs of an existing `.onnx` into the op; the result is as from `export_onnx`.

    Each attention found is rewritten or listed in the result's `rewriting` with the reason. The graph's own inputs and
    outputs stay; of `options` only `tunable`, `counts` and `unit` apply.

    Raises:
        MissingError: where `source` or its weights are not there.
        ModelError: where it is not ONNX, or holds no attention that can be rewritten.
        UsageError, ConfigError: as `export_onnx`.
    """
    path, options, config = Path(path), options or ExportOptions(), load_config(config)
    check_output(path, force=force)
    step, seconds = _stopwatch()
    graph = read_onnx(Path(source))
    step("read")
    progress("rewriting the graph")
    report, settings = rewrite(graph, config, unit=options.unit)
    _finish(graph, config, {name: one.as_dict() for name, one in settings.items()}, options)
    step("rewrite")
    progress("writing the file")
    save_onnx(graph, path, force=force)
    step("save")
    return ExportResult(path, len(report.rewritten), seconds, report)


def _finish(graph: ir.Model, config: SparseAttentionConfig, settings: dict[str, Any], options: ExportOptions) -> None:
    finish(
        graph, tunable=options.tunable, counts=options.counts,
        metadata={
            "config": config.model_dump(mode="json"), "layers": settings, "unit": options.unit,
            "signature": options.described, "versions": versions(),
        },
    )  # fmt: skip


def _stopwatch() -> tuple[Callable[[str], None], dict[str, float]]:
    """`step(name)` notes the seconds since the step before it."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def step(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[name], started = now - started, now

    return step, seconds


def export(
    model: nn.Module | Path | str,
    config: SparseAttentionConfig | Source,
    path: Path | str,
    *,
    options: ExportOptions | None = None,
    engine: EngineOptions | None = None,
    runtime: Runtime = "tensorrt",
    side_files: tuple[Any, ...] = (),
    force: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Exports a model, or rewrites an `.onnx`, as far as `export_format`, or else the suffix of `path`, says.

    Arguments as `export_onnx`; `model` may also be the path of an `.onnx`. `tensorrt` leaves the `.onnx` beside the
    engine, which is built with the options `engine`; `runtime` "tensorrt-rtx" builds a portable engine, without plugin.

    Raises:
        UsageError: where format and suffix contradict each other, or neither tells.
        MissingError: where TensorRT is needed and not installed; before anything is exported.
    """
    path, config = Path(path), load_config(config)
    kind = output_format(path, config)
    target = path
    if kind == "tensorrt":
        check_output(path, force=force)
        if not isinstance(model, nn.Module) and (nodes := op_nodes(read_onnx(Path(model)))):
            _build(Path(model), path, engine, runtime, force=force)
            return ExportResult(path, len(nodes))
        _require_engine_can_be_built(model, engine, runtime)
        target = path.with_suffix(".onnx")
    if isinstance(model, nn.Module):
        result = export_onnx(
            model, config, target, options=options, side_files=side_files, force=force, progress=progress
        )
    else:
        result = rewrite_onnx(model, config, target, options=options, force=force, progress=progress)
    if kind == "tensorrt":
        progress("building the engine")
        _build(result.path, path, engine, runtime, force=force)
        result = replace(result, path=path)
    return result


def _require_engine_can_be_built(model: nn.Module | Path | str, engine: EngineOptions | None, runtime: Runtime) -> None:
    """Stops before a model is exported for nothing."""
    if runtime == "tensorrt-rtx":
        from export.engine.tensorrt_api import import_tensorrt_rtx

        import_tensorrt_rtx()
        return
    from export.engine import require_tensorrt

    require_tensorrt(engine)
    dtype = next((p.dtype for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    if dtype == torch.float32:
        raise UsageError("the plugin's kernels compute in half precision", where="--dtype", found="float32",
                         fix="export with --dtype float16 or bfloat16")  # fmt: skip


def _build(onnx: Path, path: Path, options: EngineOptions | None, runtime: Runtime, *, force: bool) -> None:
    if runtime == "tensorrt-rtx":
        from export.runtime_rtx import build_portable_engine

        build_portable_engine(onnx, path, options=options, force=force)
        return
    from export.engine import build_engine

    build_engine(onnx, path, options=options, force=force)


def output_format(path: Path, config: SparseAttentionConfig) -> Format:
    """Where the export stops: the configuration's `export_format`, which must agree with the suffix, or the suffix.

    Raises:
        UsageError: where they contradict each other, or neither tells.
    """
    by_suffix = SUFFIXES.get(path.suffix)
    known = ", ".join(SUFFIXES)
    if by_suffix is None:
        raise UsageError("the output's suffix is not known", where=str(path), found=path.suffix or "none",
                         fix=f"use one of {known}")  # fmt: skip
    if config.export_format and config.export_format != by_suffix:
        raise UsageError(
            "export_format contradicts the output's suffix", where=str(path),
            found=f"export_format: {config.export_format}", fix=f"change one of them ({known})",
        )  # fmt: skip
    return by_suffix


def versions() -> dict[str, str]:
    """Versions of the packages that made a file."""
    names = ("block-skip-attention", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
