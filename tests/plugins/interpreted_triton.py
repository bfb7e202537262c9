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

import numpy

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
        _multiply_bfloat16()
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


def _multiply_bfloat16() -> None:
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16 matrices; here they are widened first."""
    from triton import language
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot
    if original.__name__ != "create_dot":
        return

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == language.bfloat16:
            a, b = (self.cast_impl(x, language.float32) for x in (a, b))
        return original(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = dot


def run_kernel(spec: Any, grid: tuple[int, int, int], values: dict[str, int | float]) -> None:
    """Runs every program of `grid` of a `PlainKernel`; `values` has its arguments by name, pointers as addresses."""
    with interpreting():
        function = getattr(importlib.import_module(spec.module), spec.function)
        arguments = {name: _argument(kind, values[name]) for name, kind in spec.signature.items() if name in values}
        with numpy.errstate(all="ignore"):  # infinities and NaN are meant
            # one kernel runs after the other here: there is nothing to wait for, and no instruction that would
            function[grid](**arguments, **dict(spec.constants) | {"EARLY": False})


def _argument(kind: str, value: int | float) -> Any:
    """A scalar of exactly that type, which the interpreter would otherwise guess from the value."""
    from triton import language
    from triton.runtime.interpreter import TensorHandle

    scalar = {"i32": numpy.int32, "i64": numpy.int64, "fp32": numpy.float32}.get(kind, numpy.uint64)
    ty = language.str_to_ty(kind, None)
    return language.tensor(TensorHandle(numpy.array([value], dtype=scalar), ty), ty)
