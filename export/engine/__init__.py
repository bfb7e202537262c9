"""ONNX to TensorRT: build an engine whose attention is the block-skip plugin, load it where it fits, check it."""

from export.engine.build import EngineReport, build_engine, require_tensorrt
from export.engine.check import EngineCheck, OutputCheck, check_engine
from export.engine.load import LoadedEngine, load_engine
from export.engine.options import EngineOptions
from export.engine.run import EngineRunner

__all__ = [
    "EngineCheck",
    "EngineOptions",
    "EngineReport",
    "EngineRunner",
    "LoadedEngine",
    "OutputCheck",
    "build_engine",
    "check_engine",
    "load_engine",
    "require_tensorrt",
]
