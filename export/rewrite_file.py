"""The second door: an existing `.onnx`, or a graph exported dense, whose attention subgraphs become the op."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.version_converter
import onnx_ir as ir

from export.rewrite import AttentionSite, RewriteReport, find_attention, rewrite_attention
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.errors import MissingError, ModelError
from sparse_attention.patterns import AttentionModule, ResolvedAttention, resolve

_OLDEST = 18


def read_onnx(path: Path) -> ir.Model:
    """Any ONNX file; weights stay on disk until they are needed.

    Raises:
        MissingError: where the file, or a file its weights lie in, does not exist.
        ModelError: where it is not ONNX.
    """
    if not path.is_file():
        raise MissingError("there is no such file", where=str(path), fix="pass an .onnx file that exists")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf raises its own kinds
        raise ModelError("the file cannot be read as ONNX", where=str(path), found=str(error)[:120],
                         fix="check that it is complete") from error  # fmt: skip
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and not Path(tensor.path).is_file():
            raise MissingError("the file with the weights is not there", where=str(path), found=str(tensor.location),
                               fix="put it beside the .onnx, under the name it was exported with")  # fmt: skip
    if model.graph.opset_imports.get("", _OLDEST) < _OLDEST:
        model = _converted(path)
    for number, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{number}"  # patterns and reports need one
    return model


def _converted(path: Path) -> ir.Model:
    """The file in the oldest opset that the function body is written in; onnx's own converter, weights in memory."""
    try:
        return ir.from_proto(onnx.version_converter.convert_version(onnx.load(path), _OLDEST))
    except (RuntimeError, onnx.version_converter.ConvertError) as error:
        raise ModelError(
            f"the file is older than opset {_OLDEST} and cannot be converted", where=str(path),
            found=str(error).strip().splitlines()[0], fix=f"export it again with opset {_OLDEST} or later",
        ) from error  # fmt: skip


def rewrite(
    model: ir.Model, config: SparseAttentionConfig, *, unit: str = "head", dry_run: bool = False
) -> tuple[RewriteReport, dict[str, ResolvedAttention]]:
    """Rewrites the attentions that `config` matches, in place; also gives every attention's settings by name.

    Patterns match the names and classes of the PyTorch modules around an attention where the file tells them, else the
    name of its node and the class `Attention`.

    Raises:
        ModelError: where the graph holds no attention, or none that is matched can be rewritten.
    """
    sites = find_attention(model)
    if not sites:
        raise ModelError("the graph holds no attention", where=model.graph.name or "the graph",
                         found=f"{len(list(model.graph))} nodes, no Attention and no Softmax that feeds a product",
                         fix="pass the whole model, exported from PyTorch")  # fmt: skip
    settings = resolve(config, [AttentionModule(site.module, site.class_name or "Attention") for site in sites])
    report = rewrite_attention(model, _by_module(settings), unit=unit, dry_run=dry_run)
    if not report.rewritten:
        reasons = {left.reason for left in report.left}
        raise ModelError("no attention of the graph could be rewritten", found="; ".join(sorted(reasons))[:400],
                         fix="export it from PyTorch, or change the patterns")  # fmt: skip
    return report, settings


def _by_module(settings: dict[str, ResolvedAttention]) -> Callable[[AttentionSite], ResolvedAttention | None]:
    return lambda site: settings.get(site.module)
