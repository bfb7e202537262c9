"""The file beside an engine that says what it is: `out.engine.json`. Loading compares it with where it is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.engine.plugin import PluginLibrary, sha256_of
from sparse_attention.errors import MissingError, UsageError

FORMAT = 2
_NEEDED = {"version_compatible", "hardware_compatibility", "plugin_placement"}
"""Options that decide where an engine may be loaded."""


@dataclass(frozen=True)
class Gpu:
    """A GPU's name and compute capability, for example "NVIDIA H100 80GB HBM3" and "9.0"."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Sidecar:
    """What was recorded when an engine was built.

    `configuration` is that of the sparsified model, None where the `.onnx` carried none; `exported` says how the graph
    was made of it (`ExportedModel.exported`).
    """

    runtime: str
    version: str
    sha256: str
    bytes: int
    gpu: Gpu | None
    plugin: dict[str, Any] | None
    profiles: dict[str, Any]
    options: dict[str, Any]
    configuration: Any
    exported: dict[str, Any]
    onnx_sha256: str
    nodes: int
    format: int = FORMAT


def current_gpu() -> Gpu | None:
    """The GPU this process would use, None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}")


def sidecar_path(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Writes JSON; the caller decides where, so that engine and sidecar appear together."""
    path.write_text(json.dumps(asdict(sidecar), indent=2) + "\n")


def read_sidecar(engine: Path) -> Sidecar:
    """The record of an engine. Raises MissingError for a missing or unreadable one."""
    path = sidecar_path(engine)
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, expected {FORMAT}")
        if missing := _NEEDED - set(values["options"]):
            raise ValueError(f"no options {', '.join(sorted(missing))}")
        gpu = values.pop("gpu")
        return Sidecar(gpu=None if gpu is None else Gpu(**gpu), **values)
    except FileNotFoundError as error:
        raise MissingError(
            "The engine has no record beside it.", where=str(path), found="no such file",
            fix="Copy it together with the engine, or build the engine again.",
        ) from error  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise MissingError(
            "The engine's record cannot be read.", where=str(path), found=str(error), fix="Build the engine again."
        ) from error


def check_file(engine: Path, sidecar: Sidecar) -> None:
    """Raises MissingError where the engine is absent, cut off or changed since it was built."""
    if not engine.is_file():
        raise MissingError(
            "There is no such engine.", where=str(engine), fix="Build it with `sparse-attention export`."
        )
    size = engine.stat().st_size
    if size != sidecar.bytes:
        raise MissingError(
            "The engine file was cut off or extended.", where=str(engine),
            found=f"{size} bytes, built with {sidecar.bytes}", fix="Copy it again, or build it again.",
        )  # fmt: skip
    found = sha256_of(engine)
    if found != sidecar.sha256:
        raise MissingError(
            "The engine file is not the one that was built.", where=str(engine),
            found=f"SHA-256 {found[:16]}..., built with {sidecar.sha256[:16]}...",
            fix="Copy it again, or build it again.",
        )  # fmt: skip


def check_place(engine: Path, sidecar: Sidecar, version: str, gpu: Gpu | None, plugin: PluginLibrary | None) -> None:
    """Raises MissingError where this TensorRT, GPU or plugin library is not what the engine was built for."""
    where = str(engine)
    built_major = sidecar.version.split(".", maxsplit=1)[0]
    if version != sidecar.version and not (
        sidecar.options["version_compatible"] and int(version.split(".", maxsplit=1)[0]) >= int(built_major)
    ):
        raise MissingError(
            "The engine was built by another version of TensorRT.", where=where,
            found=f"TensorRT {version}, built with {sidecar.version}",
            fix=f"Install TensorRT {sidecar.version}, or build again (--version-compatible loads in later versions).",
        )  # fmt: skip
    if gpu is None:
        raise MissingError(
            "An engine runs on a GPU, and there is none.", where=where, found="no NVIDIA GPU in this process",
            fix="Run it on a machine with " + (sidecar.gpu.name if sidecar.gpu else "an NVIDIA GPU") + ".",
        )  # fmt: skip
    if sidecar.gpu is not None and not _runs_on(sidecar, gpu):
        raise MissingError(
            "The engine was built for another GPU.", where=where,
            found=f"{gpu.name} (compute capability {gpu.compute_capability}), "
            f"built for {sidecar.gpu.name} ({sidecar.gpu.compute_capability})",
            fix="Build it on this machine, or with --hardware-compatibility ampere+.",
        )  # fmt: skip
    if sidecar.plugin is None or sidecar.options["plugin_placement"] == "embedded":
        return
    if plugin is None or plugin.sha256 != sidecar.plugin["sha256"]:
        raise MissingError(
            "The plugin library is not the one the engine was built with.", where=where,
            found="no library" if plugin is None else f"{plugin.path} with SHA-256 {plugin.sha256[:16]}...",
            fix=f"Give --plugin with the library of SHA-256 {sidecar.plugin['sha256'][:16]}..., or build again.",
        )  # fmt: skip


def _runs_on(sidecar: Sidecar, gpu: Gpu) -> bool:
    assert sidecar.gpu is not None
    here, built = (tuple(map(int, g.compute_capability.split("."))) for g in (gpu, sidecar.gpu))
    if sidecar.options["hardware_compatibility"] == "ampere+":
        return here >= (8, 0)
    if sidecar.options["hardware_compatibility"] == "same":
        return here == built
    return gpu == sidecar.gpu


def require_engine_suffix(path: Path) -> None:
    """Raises UsageError for an output that does not look like an engine."""
    if path.suffix not in (".engine", ".plan"):
        raise UsageError(
            "The name of an engine ends in .engine or .plan.", where=str(path), found=path.suffix or "no suffix",
            fix=f"Write {path.with_suffix('.engine')}.",
        )  # fmt: skip
