"""The `tensorrt` module where it is installed, and a logger that keeps what TensorRT says."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

from sparse_attention.errors import MissingError

SUPPORTED_MAJORS = (10, 11)
"""`IPluginV3` and its creators are the same in these; other versions were never looked at."""


def import_tensorrt() -> ModuleType:
    """The `tensorrt` module; raises MissingError with what to install where it, its libraries or its version lack."""
    try:
        tensorrt = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        raise MissingError(
            "TensorRT is not installed.", where="import tensorrt", found=str(error),
            fix="pip install 'tensorrt>=10.14,<12' (the libraries come from NVIDIA's package index, pypi.nvidia.com), "
            "or build a portable engine with --runtime tensorrt-rtx.",
        ) from error  # fmt: skip
    except (ImportError, OSError) as error:
        raise MissingError(
            "TensorRT's Python module is there, its libraries cannot be loaded.", where="import tensorrt",
            found=str(error), fix="Install tensorrt with its libraries, or add their folder to LD_LIBRARY_PATH.",
        ) from error  # fmt: skip
    major = major_of(tensorrt)
    if major not in SUPPORTED_MAJORS:
        raise MissingError(
            "This version of TensorRT is not supported.", where="import tensorrt", found=str(tensorrt.__version__),
            fix=f"Install TensorRT {' or '.join(map(str, SUPPORTED_MAJORS))}.",
        )  # fmt: skip
    return tensorrt


def import_tensorrt_rtx() -> ModuleType:
    """The `tensorrt_rtx` module; raises MissingError with what to install."""
    try:
        return importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        raise MissingError(
            "TensorRT-RTX is not installed.", where="import tensorrt_rtx", found=str(error),
            fix="pip install tensorrt-rtx",
        ) from error  # fmt: skip


def major_of(tensorrt: ModuleType) -> int:
    return int(str(tensorrt.__version__).split(".", maxsplit=1)[0])


def make_logger(tensorrt: ModuleType, *, verbose: bool = False) -> Any:
    """A `tensorrt.ILogger` whose `errors` and `warnings` are the messages so far; verbose ones go to `info`."""

    class Collector(tensorrt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.info: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            severities = tensorrt.ILogger
            if severity in (severities.INTERNAL_ERROR, severities.ERROR):
                self.errors.append(message)
            elif severity == severities.WARNING:
                self.warnings.append(message)
            elif verbose:
                self.info.append(message)

    return Collector()


_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"out ?of ?memory|insufficient memory|cudaErrorMemoryAllocation|requested amount of memory",
        "There is not enough memory for the engine.",
        "Lower the largest shapes (--shapes), raise --workspace where you gave one, or free the GPU.",
    ),
    (
        r"no CUDA-capable device|CUDA initialization failure|driver version is insufficient|cudaError 35|cudaError 100",
        "TensorRT found no usable GPU.",
        "Run this on a machine with an NVIDIA GPU and a driver that is new enough, "
        "or build a portable engine with --runtime tensorrt-rtx.",
    ),
    (
        r"could not find any supported formats|no kernel for this call",
        "The plugin does not serve a node as it was exported.",
        "Export the model with --dtype float16 or bfloat16 and with tile sizes that the message names.",
    ),
    (
        r"not compatible|expecting compute|different version|version tag|Version tag does not match",
        "The engine was built for another GPU or another version of TensorRT.",
        "Build the engine on this machine, or with --hardware-compatibility and --version-compatible.",
    ),
    (
        r"plan\.header|magic|corrupt|Serialization assertion",
        "The engine file is damaged.",
        "Copy or build the engine again.",
    ),
)  # fmt: skip


def explain(errors: list[str], otherwise: str, where: str) -> MissingError:
    """What TensorRT's errors mean to the user, with the first of them as evidence."""
    evidence = "; ".join(dict.fromkeys(errors[:3])) or "TensorRT gave no reason"
    # The first error is the cause; what follows it often only says that there is no GPU to clean up on.
    for message in errors:
        for pattern, what, fix in _CAUSES:
            if re.search(pattern, message, re.IGNORECASE):
                return MissingError(what, where=where, found=evidence, fix=fix)
    return MissingError(otherwise, where=where, found=evidence, fix="See TensorRT's message above.")
