"""Callable pattern keys, and how they are written into a file: ``package.module:qualname``."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from functools import reduce
from typing import cast

from sparse_attention.errors import ConfigError

_SPELLING = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_spelling(text: str) -> bool:
    """Whether ``text`` names a callable; module names and patterns hold no colon."""
    return _SPELLING.fullmatch(text) is not None


def load(text: str) -> Callable[[str], bool]:
    """The callable that ``text`` names. Imports its module: read such configurations from people you trust.

    Raises:
        ValueError: where the module or the name does not exist, or is not callable.
    """
    module, _, qualname = text.partition(":")
    try:
        found = reduce(getattr, qualname.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load the callable {text}: {error}") from error
    if not callable(found):
        raise ValueError(f"{text} is not callable")
    return cast(Callable[[str], bool], found)


def spell(key: str | Callable[[str], bool]) -> str:
    """The text of a key, such that ``load`` gives the same callable back.

    Raises:
        ConfigError: for a callable that no other process could import.
    """
    if isinstance(key, str):
        return key
    module, qualname = getattr(key, "__module__", None), getattr(key, "__qualname__", None)
    reason = ""
    if not module or not qualname:
        reason = f"{type(key).__name__} objects have no name to import"
    elif "<lambda>" in qualname:
        reason = "a lambda has no name to import"
    elif "<locals>" in qualname:
        reason = "it is defined inside a function"
    elif module == "__main__":
        reason = "it is defined in the script itself (__main__), which means another file in another process"
    elif not _names(key, module, qualname):
        reason = f"{module}:{qualname} is another object"
    if reason:
        raise ConfigError(
            "this callable pattern cannot be written to a file",
            where=f"sparse_cfg[{label(key)}]",
            found=reason,
            fix="define it as a plain function at the top level of a module, or use a name pattern",
        )
    return f"{module}:{qualname}"


def label(key: str | Callable[[str], bool]) -> str:
    """A key for messages; never fails."""
    if isinstance(key, str):
        return f'"{key}"'
    return f"{getattr(key, '__module__', '?')}:{getattr(key, '__qualname__', repr(key))}"


def _names(key: object, module: str, qualname: str) -> bool:
    try:
        return reduce(getattr, qualname.split("."), sys.modules[module]) == key
    except (KeyError, AttributeError):
        return False
