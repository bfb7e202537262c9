"""Loading an engine where its record says that it fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.engine.plugin import check_tensorrt, find_plugin, load_plugin
from export.engine.sidecar import Sidecar, check_file, check_place, current_gpu, read_sidecar
from export.engine.tensorrt_api import explain, import_tensorrt, import_tensorrt_rtx, make_logger


@dataclass
class LoadedEngine:
    """A deserialised engine with what must outlive it (logger, runtime) and its record."""

    tensorrt: Any
    engine: Any
    runtime: Any
    logger: Any
    sidecar: Sidecar


def load_engine(path: Path, *, plugin: Path | None = None) -> LoadedEngine:
    """Deserialises an engine this project built.

    Raises MissingError where the file was changed since, where this TensorRT, GPU or plugin library is not what it was
    built for, or where TensorRT refuses it: before it is given to TensorRT wherever that can be told.
    """
    sidecar = read_sidecar(path)
    check_file(path, sidecar)
    tensorrt = import_tensorrt_rtx() if sidecar.runtime == "tensorrt-rtx" else import_tensorrt()
    is_beside = sidecar.plugin is not None and sidecar.options["plugin_placement"] == "beside"
    library = find_plugin(plugin) if is_beside else None
    check_place(path, sidecar, tensorrt.__version__, current_gpu(), library)
    logger = make_logger(tensorrt)
    runtime = tensorrt.Runtime(logger)
    if library is not None:
        check_tensorrt(library, tensorrt.__version__)
        load_plugin(runtime.get_plugin_registry(), library, logger.errors)
    elif sidecar.plugin is not None:
        # An embedded plugin library is host code inside the engine; we built this file, its hash says so.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise explain(logger.errors, "TensorRT could not load the engine.", str(path))
    return LoadedEngine(tensorrt, engine, runtime, logger, sidecar)
