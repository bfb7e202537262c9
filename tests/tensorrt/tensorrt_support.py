"""Running a program or a piece of Python in a process of its own; the host's script as a module."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libblockskip_tensorrt.so"
HOST = "blockskip_plugin_host"

Run = Callable[..., subprocess.CompletedProcess[str]]


def run_process(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program from the repository's root; output and errors are kept as text."""
    paths = [str(ROOT), environment.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, cwd=ROOT, check=False,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip


def load_write_plan() -> ModuleType:
    return load_host_script("write_plan")


def load_host_script(name: str) -> ModuleType:
    """A script of the host as a module: `plugins/` cannot be imported from."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"plugins/host/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


WORKSPACE = 1 << 16


def enqueue_emulated(
    emulation: Any,
    build: Path,
    plan: Path,
    node: str,
    profile: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    workspace_bytes: int = WORKSPACE,
) -> None:
    """Walks one profile of one node of a plan through the plugin and enqueues it on the emulated GPU.

    Raises AssertionError with the reason of a failed step, and what the emulation raised.
    """
    library = ctypes.CDLL(str(build / "libblockskip_plugin_walk_c.so"))
    workspace = torch.full((workspace_bytes,), 255, dtype=torch.uint8)
    reason = ctypes.create_string_buffer(1024)
    emulation.seed, emulation.launched, emulation._error = 0, [], None

    def pointers(tensors: Sequence[Tensor]) -> Any:
        return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])

    failed = library.blockskipWalkEnqueue(
        str(build / LIBRARY).encode(), str(plan).encode(), node.encode(), profile.encode(), pointers(inputs),
        pointers(outputs), ctypes.c_void_p(workspace.data_ptr()), ctypes.c_size_t(workspace_bytes), None, reason,
        ctypes.c_size_t(len(reason)),
    )  # fmt: skip
    if emulation._error is not None:
        raise emulation._error
    assert not failed, reason.value.decode()
