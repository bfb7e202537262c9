"""The plugin library on this machine: found, understood, checked against TensorRT, loaded into its registry."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from export import op
from export.engine.tensorrt_api import SUPPORTED_MAJORS
from sparse_attention.errors import MissingError

LIBRARY = "libblockskip_tensorrt.so"
VARIABLE = "BLOCKSKIP_TENSORRT_PLUGIN"
BUILD = "cmake -S plugins -B build && cmake --build build"


@dataclass(frozen=True)
class PluginLibrary:
    """A plugin library: where it is, its SHA-256, the TensorRT headers it was compiled with, what its kernels are."""

    path: Path
    sha256: str
    tensorrt_headers: str
    plugin_version: str
    kernels: Any


def find_plugin(path: Path | None = None) -> PluginLibrary:
    """The library at `path`, or named by the environment, or in the build folder of the source tree.

    Raises MissingError with the command that builds it, or with the reason why it cannot be loaded or used.
    """
    found = Path(path or os.environ.get(VARIABLE) or Path(__file__).resolve().parents[2] / "build" / LIBRARY)
    if not found.is_file():
        raise MissingError(
            "The TensorRT plugin is not built.", where=str(found),
            fix=f"Build it with `{BUILD}`, or give --plugin PATH or {VARIABLE}=PATH.",
        )  # fmt: skip
    found = found.resolve()
    info = _read_info(found)
    if info.get("plugin_version") != str(op.VERSION):
        raise MissingError(
            "The plugin library has another version of the op.", where=str(found),
            found=str(info.get("plugin_version")), fix=f"Build it again: this package needs version {op.VERSION}.",
        )  # fmt: skip
    # Before anything is asked of it: the layout of what it takes may differ between major versions.
    _require_supported("compiled for", info["tensorrt_headers"], found)
    return PluginLibrary(found, sha256_of(found), info["tensorrt_headers"], info["plugin_version"], info["kernels"])


def check_tensorrt(plugin: PluginLibrary, tensorrt_version: str) -> None:
    """Raises MissingError where the library was compiled for a TensorRT whose plugins this one cannot take."""
    _require_supported("compiled for", plugin.tensorrt_headers, plugin.path)
    _require_supported("to be loaded into", tensorrt_version, plugin.path)


def _require_supported(what: str, version: str, library: Path) -> None:
    if int(version.split(".", maxsplit=1)[0]) not in SUPPORTED_MAJORS:
        raise MissingError(
            f"The plugin library was {what} a TensorRT that is not supported.", where=str(library),
            found=f"TensorRT {version}",
            fix=f"Build it with the headers of the TensorRT you use: TENSORRT_ROOT=... {BUILD}",
        )  # fmt: skip


def load_plugin(registry: Any, plugin: PluginLibrary, errors: list[str]) -> Any:
    """Loads the library into a plugin registry and returns the handle; `errors` is the logger's list.

    A creator of this name that is there already stays: loading twice is an error of TensorRT.
    """
    if registry.get_creator(op.OP_TYPE, str(op.VERSION), op.DOMAIN) is not None:
        return None
    handle = registry.load_library(str(plugin.path))
    if handle is None or registry.get_creator(op.OP_TYPE, str(op.VERSION), op.DOMAIN) is None:
        raise MissingError(
            "TensorRT did not take the plugin library.", where=str(plugin.path), found="; ".join(errors[:3]),
            fix=f"Build it with the headers of the TensorRT you use: TENSORRT_ROOT=... {BUILD}",
        )  # fmt: skip
    return handle


@cache
def open_library(path: Path) -> ctypes.CDLL:
    """The library in this process; raises MissingError with the loader's words."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingError(
            "The plugin library cannot be loaded.", where=str(path), found=str(error), fix=f"Build it again: `{BUILD}`"
        ) from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_info(path: Path) -> dict[str, Any]:
    try:
        function = open_library(path).blockskipPluginInfo
    except AttributeError as error:
        raise MissingError(
            "The file is a library, but not this project's TensorRT plugin.", where=str(path),
            found="it does not export blockskipPluginInfo", fix=f"Give the {LIBRARY} that `{BUILD}` leaves in build/.",
        ) from error  # fmt: skip
    function.restype = ctypes.c_char_p
    info: dict[str, Any] = json.loads(function().decode())
    return info
