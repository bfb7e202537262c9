"""Kernels in plain Triton, executed by Triton's own interpreter on the CPU.

The interpreter is chosen when Triton is imported, so it is imported a second time, aside, for these kernels: the other
importers of Triton in this process compile as ever. The C extension is the same for both.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

KERNELS = Path(__file__).resolve().parents[2] / "plugins" / "kernels"
VARIABLE = "TRITON_INTERPRET"
_interpreting: dict[str, ModuleType] = {}


def _is_ours(name: str) -> bool:
    return (name.split(".")[0] == "triton" and not name.startswith("triton._C")) or (KERNELS / f"{name}.py").is_file()


@contextmanager
def interpreting() -> Iterator[None]:
    """Within it, `import triton` and the kernels' modules mean those that are interpreted."""
    before = os.environ.get(VARIABLE)
    others = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    for name in others:
        del sys.modules[name]
    sys.modules.update(_interpreting)
    sys.path.insert(0, str(KERNELS))
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        sys.path.remove(str(KERNELS))
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before
        _interpreting.update({name: module for name, module in sys.modules.items() if _is_ours(name)})
        for name in _interpreting:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def run_kernel(module: str, function: str, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
    """Runs every program of `grid`; `arguments` by name: tensors, numbers, constants."""
    with interpreting():
        getattr(importlib.import_module(module), function)[grid](**arguments)
