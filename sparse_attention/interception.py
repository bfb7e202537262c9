"""What a module's own code calls, and replacing its `forward`: nothing outside of that module changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

_BEFORE = "_block_skip_forward"


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Makes `forward(module, *args, **kwargs)` the module's own, in the instance and not in its class.

    A bound method, and not a closure, so that a deep copy of the model calls the copy.
    """
    module.__dict__[_BEFORE] = module.__dict__.get("forward")
    module.__dict__["forward"] = MethodType(forward, module)


def forward_before(module: nn.Module) -> Callable[..., Any]:
    """The forward that `replace_forward` replaced."""
    before = module.__dict__[_BEFORE]
    return MethodType(type(module).forward, module) if before is None else before


def restore_forward(module: nn.Module) -> None:
    """Undoes `replace_forward`; does nothing where there is nothing to undo."""
    if _BEFORE not in module.__dict__:
        return
    before = module.__dict__.pop(_BEFORE)
    if before is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = before


def names_called(module: nn.Module) -> set[str]:
    """Names in the code of the module's forward, and of the functions and methods that it names in turn.

    The modules it calls have code of their own, and so have the libraries: neither is followed.
    """
    owner = type(module)
    found: set[str] = set()
    seen: set[CodeType] = set()
    waiting: list[Any] = [inspect.unwrap(owner.forward)]
    while waiting:
        current = waiting.pop()
        code = getattr(current, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        names = {name for part in _codes(code) for name in part.co_names}
        found |= names
        for name in names:
            methods = [vars(base)[name] for base in owner.__mro__ if name in vars(base)]  # with those of super()
            for helper in (current.__globals__.get(name), *methods):
                helper = getattr(helper, "__func__", helper)
                if isinstance(helper, FunctionType) and _is_own(helper, owner):
                    waiting.append(inspect.unwrap(helper))
    return found


def _is_own(helper: FunctionType, owner: type) -> bool:
    return helper.__module__ == owner.__module__ or not str(helper.__module__).startswith(("torch.", "transformers."))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code and everything defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
