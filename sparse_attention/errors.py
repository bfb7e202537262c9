"""Errors a user can act on: what happened, where, what was found, how to fix it."""

from __future__ import annotations


class SparseAttentionError(Exception):
    """Base of every error this project raises on purpose.

    ``str(error)`` is the whole message, one fact per line; ``exit_code`` is what the command line ends with.
    A traceback is for bugs only, so a command line prints ``str(error)`` and nothing else.

    Args:
        what: what went wrong, in one sentence.
        where: the file, key, module, node or tensor it happened at.
        found: what was there instead of what was expected.
        fix: what the user can do about it.
    """

    exit_code: int = 2

    def __init__(self, what: str, *, where: str = "", found: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.found = found
        self.fix = fix

    def __str__(self) -> str:
        details = (("where", self.where), ("found", self.found), ("fix", self.fix))
        return "\n".join([self.what, *(f"  {name}: {text}" for name, text in details if text)])

    def __reduce__(self) -> tuple[object, ...]:
        # Exception.__reduce__ would lose the keyword-only parts when a worker process sends the error back.
        return (type(self), (self.what,), {"where": self.where, "found": self.found, "fix": self.fix})


class ConfigError(SparseAttentionError):
    """A configuration that cannot be meant: unknown key, value out of range, pattern that matches nothing."""


class UsageError(SparseAttentionError):
    """A call or command line that cannot be carried out as written."""


class ModelError(SparseAttentionError):
    """A model, or one of its attention modules, that cannot be handled."""


class CheckError(SparseAttentionError):
    """A check ran and failed."""

    exit_code = 1


class MissingError(SparseAttentionError):
    """A file, package, GPU or library that is needed is not there."""

    exit_code = 3
