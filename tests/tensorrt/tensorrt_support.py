"""Running a program or a piece of Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

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
