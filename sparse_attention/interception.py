"""Replacing one module's `forward`, and undoing it: nothing outside of that module changes."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
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
