"""From sparsified PyTorch models to `.onnx` and TensorRT engines, and the proof that they compute the same."""

from export.guard import require_own_package

require_own_package()

from export.parity import ParityReport, check  # noqa: E402
from export.pipeline import ExportOptions, ExportResult, export, export_onnx, rewrite_onnx  # noqa: E402

__all__ = [
    "ExportOptions",
    "ExportResult",
    "ParityReport",
    "check",
    "export",
    "export_onnx",
    "rewrite_onnx",
]
