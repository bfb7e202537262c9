"""Kernels in plain Triton, executed by Triton's own interpreter on the CPU.

The interpreter is chosen when Triton is imported, so it is imported a second time, aside, for these kernels: the other
importers of Triton in this process compile as ever. The C extension is the same for both.
"""

from __future__ import annotations

import functools
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
OURS = {path.stem for path in KERNELS.glob("*.py")}
VARIABLE = "TRITON_INTERPRET"
_interpreting: dict[str, ModuleType] = {}


def _is_ours(name: str) -> bool:
    return (name.split(".")[0] == "triton" and not name.startswith("triton._C")) or name in OURS


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
        _prepare()
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


def _prepare() -> None:
    """Once, of the Triton that is interpreted: an error of its is mended, and work that it repeats is done once."""
    from triton.runtime import interpreter

    if interpreter.InterpreterBuilder.create_dot.__name__ == "create_dot":
        _multiply_bfloat16(interpreter)
        _patch_once(interpreter)
        _remember_types(interpreter)
        # computes every sum of integers again in 64 bits, for an assertion that is off
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _multiply_bfloat16(interpreter: Any) -> None:
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16 matrices; here they are widened first."""
    from triton import language

    original = interpreter.InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == language.bfloat16:
            a, b = (self.cast_impl(x, language.float32) for x in (a, b))
        return original(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = dot


def _remember_types(interpreter: Any) -> None:
    """NumPy's type for one of Triton's, for which a table of all of them is made each time."""
    from triton import language

    original = interpreter._get_np_dtype
    of_scalar = functools.cache(original)

    def of(kind: Any) -> Any:
        scalar = kind.scalar
        return original(kind) if isinstance(scalar, language.pointer_type) else of_scalar(scalar)

    interpreter._get_np_dtype = of


def _patch_once(interpreter: Any) -> None:
    """The language's functions become interpreted ones, and stay so: nothing else uses this copy of Triton.

    Triton looks through all of the language for it at every call of every function of a kernel, a third of the time,
    and takes it back after every launch.
    """
    original = interpreter._patch_lang
    seen: set[int] = set()

    def patch(function: Any) -> Any:
        names = function.__globals__  # what is patched depends on nothing else
        if id(names) not in seen:
            original(function)
            seen.add(id(names))
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch


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
