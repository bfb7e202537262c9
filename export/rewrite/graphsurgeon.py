"""The rewriting for users of onnx-graphsurgeon: a `Graph` in, a `Graph` out.

graphsurgeon drops node metadata, so settings can only match node names here. Its graphs hold the op and its function
body like any other node and function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from export.finish import finish
from export.rewrite.attention import rewrite_attention
from export.rewrite.report import RewriteReport, Settings
from sparse_attention.errors import MissingError

if TYPE_CHECKING:
    import onnx_graphsurgeon


def rewrite_graph(
    graph: onnx_graphsurgeon.Graph, settings: Settings, *, unit: str = "head"
) -> tuple[onnx_graphsurgeon.Graph, RewriteReport]:
    """Like `rewrite_attention` on a graphsurgeon graph; returns a new graph, with the function body attached.

    Raises:
        MissingError: where onnx-graphsurgeon is not installed.
        ConfigError: as `rewrite_attention`.
    """
    try:
        import onnx_graphsurgeon as gs
    except ImportError as error:
        raise MissingError("onnx-graphsurgeon is not installed", fix="pip install onnx-graphsurgeon") from error
    model = ir.from_proto(gs.export_onnx(graph, do_type_check=False))
    report = rewrite_attention(model, settings, unit=unit)
    if report.rewritten:
        finish(model)
    return gs.import_onnx(ir.to_proto(model)), report
