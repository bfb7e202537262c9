"""ONNX to TensorRT: build an engine whose attention is the block-skip plugin, load it where it fits, check it."""

from export.engine.against import Against, Case, against_model, against_onnx
from export.engine.build import EngineReport, build_engine, require_tensorrt
from export.engine.check import EngineCheck, OutputCheck, check_engine
from export.engine.load import LoadedEngine, load_engine
from export.engine.options import EngineOptions
from export.engine.run import EngineRunner

__all__ = [
    "Against",
    "Case",
    "EngineCheck",
    "EngineOptions",
    "EngineReport",
    "EngineRunner",
    "LoadedEngine",
    "OutputCheck",
    "against_model",
    "against_onnx",
    "build_engine",
    "check_engine",
    "load_engine",
    "require_tensorrt",
]
