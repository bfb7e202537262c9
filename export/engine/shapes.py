"""Optimisation profiles: from `--shapes name:min,opt,max` and the model's own dimension names to a range per input."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from export.engine.model import Dim, TensorInfo
from sparse_attention.errors import UsageError

PHASES = ("prefill", "decode")
DEFAULT_LENGTH = 2048
DEFAULT_BATCH = 1


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest size of a dimension; `0 <= min <= opt <= max`."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise UsageError(
                "A range of sizes has to be ascending and not negative.", found=f"{self.min},{self.opt},{self.max}",
                fix="Write min,opt,max with 0 <= min <= opt <= max, or one number for a fixed size.",
            )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.min},{self.opt},{self.max}"


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: for each input its smallest, best and largest shape."""

    name: str
    inputs: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def parse_shapes(texts: Iterable[str]) -> dict[str, Range]:
    """`sequence:1,512,4096`, `decode.past:1,1024,4096` or `batch:1` to ranges by (phase-qualified) dimension name."""
    ranges: dict[str, Range] = {}
    for text in texts:
        name, separator, sizes = text.rpartition(":")
        numbers = sizes.split(",")
        if not separator or not name or len(numbers) not in (1, 3) or not all(n.strip().isdigit() for n in numbers):
            raise UsageError(
                "A shape cannot be read.", where="--shapes", found=repr(text),
                fix="Write name:min,opt,max with the name of a dimension, for example sequence:1,512,4096; "
                "decode.past:1,1024,4096 is for one profile only, batch:1 a fixed size.",
            )  # fmt: skip
        if name in ranges:
            raise UsageError("A shape is given twice.", where="--shapes", found=name, fix="Give it once.")
        ranges[name] = Range(*[int(n) for n in (numbers if len(numbers) == 3 else numbers * 3)])
    return ranges


def make_profiles(
    inputs: Sequence[TensorInfo], given: Mapping[str, Range], *, max_length: int = DEFAULT_LENGTH
) -> tuple[Profile, ...]:
    """One profile for prefill, and one for decode where the model has a cache to decode with.

    `given` has precedence over the defaults; without it, batch is 1, a prefill has 1 to `max_length` tokens and an
    empty cache, a decode step one token and 1 to `max_length - 1` cached ones. Raises UsageError naming every dimension
    that has neither a range nor a known meaning, and every given name that the model does not have.
    """
    symbols = _symbols(inputs)
    _check_given(given, symbols)
    # A cache of a fixed size has no dimension of its own, only its inputs.
    has_cache = any(_role(name) in ("past", "total") for name in symbols) or any("past" in t.name for t in inputs)
    sequence = next((name for name in symbols if _role(name) == "sequence"), None)
    phases = PHASES if has_cache and sequence is not None else PHASES[:1]
    profiles = []
    for phase in phases:
        ranges = {name: _range_of(name, phase, given, max_length) for name in symbols}
        _add_up(ranges)
        missing = sorted(name for name, found in ranges.items() if found is None)
        if missing:
            raise UsageError(
                "The model has dimensions without a range.", where=f"profile {phase}", found=", ".join(missing),
                fix=" ".join(f"--shapes {name}:MIN,OPT,MAX" for name in missing),
            )  # fmt: skip
        profiles.append(_profile(phase, inputs, {name: r for name, r in ranges.items() if r is not None}))
    return tuple(profiles)


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The size of a dimension such as `past + sequence` where the sizes of the names in it are known."""
    return dim if isinstance(dim, int) else _evaluate(ast.parse(dim, mode="eval").body, sizes)


_OPERATIONS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_evaluate(left, sizes), _evaluate(right, sizes))
    raise UsageError(
        "A dimension of the model is neither a name nor a sum of names.", found=ast.unparse(node),
        fix="Export the model again with named dimensions.",
    )  # fmt: skip


def _symbols(inputs: Sequence[TensorInfo]) -> list[str]:
    """The dimension names of the inputs; those inside an expression are single names by themselves."""
    symbols: list[str] = []
    for tensor in inputs:
        if tensor.dims is None or "" in tensor.dims:
            raise UsageError(
                "An input of the model has a dimension without a name or size.", where=f"input {tensor.name}",
                found=str(tensor.dims), fix="Export the model again with named dimensions.",
            )  # fmt: skip
        for dim in tensor.dims:
            if isinstance(dim, str):
                try:
                    names = [n.id for n in ast.walk(ast.parse(dim, mode="eval")) if isinstance(n, ast.Name)]
                except SyntaxError as error:
                    raise UsageError(
                        "The name of a dimension cannot be read.", where=f"input {tensor.name}", found=repr(dim),
                        fix="Export the model again with plain dimension names.",
                    ) from error  # fmt: skip
                symbols += [name for name in names if name not in symbols]
    return symbols


def _check_given(given: Mapping[str, Range], symbols: Sequence[str]) -> None:
    allowed = {*symbols, *(f"{phase}.{name}" for phase in PHASES for name in symbols)}
    unknown = sorted(set(given) - allowed)
    if unknown:
        raise UsageError(
            "--shapes names a dimension that the model does not have.", where="--shapes", found=", ".join(unknown),
            fix=f"The dimensions of the model are: {', '.join(symbols) or 'none, all are fixed'}.",
        )  # fmt: skip


def _role(name: str) -> str | None:
    """What a dimension means, by its name."""
    patterns = {
        "batch": r"batch|^b$|^n$",
        "past": r"past|cache",
        "total": r"total|kv|key|context|mask",
        "sequence": r"seq|token|query|length",
    }
    return next((role for role, pattern in patterns.items() if re.search(pattern, name.lower())), None)


def _range_of(name: str, phase: str, given: Mapping[str, Range], longest: int) -> Range | None:
    role = _role(name)
    found = given.get(f"{phase}.{name}")
    if found is None and not (phase == "decode" and role == "sequence"):
        # An unqualified range of the sequence is the prefill's: a decode step has one token.
        found = given.get(name)
    if found is not None:
        return found
    middle = max(1, longest // 4)
    cached = max(1, longest - 1)
    defaults = {
        "batch": Range(DEFAULT_BATCH, DEFAULT_BATCH, DEFAULT_BATCH),
        "past": Range(0, 0, 0) if phase == "prefill" else Range(1, min(middle, cached), cached),
        "sequence": Range(1, middle, longest) if phase == "prefill" else Range(1, 1, 1),
    }
    return defaults.get(role or "")


def _add_up(ranges: dict[str, Range | None]) -> None:
    """A dimension that means all keys is the cached ones and the new ones together, unless it was given."""
    by_role = {_role(name): found for name, found in ranges.items()}
    past, sequence = by_role.get("past") or Range(0, 0, 0), by_role.get("sequence")
    for name, found in ranges.items():
        if found is None and _role(name) == "total" and sequence is not None:
            ranges[name] = Range(past.min + sequence.min, past.opt + sequence.opt, past.max + sequence.max)


def _profile(name: str, inputs: Sequence[TensorInfo], ranges: Mapping[str, Range]) -> Profile:
    bounds = [
        {n: r.min for n, r in ranges.items()},
        {n: r.opt for n, r in ranges.items()},
        {n: r.max for n, r in ranges.items()},
    ]

    def shapes(dims: Sequence[Dim]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        low, best, high = (tuple(evaluate(dim, sizes) for dim in dims) for sizes in bounds)
        return low, best, high

    return Profile(name, {tensor.name: shapes(tensor.dims) for tensor in inputs if tensor.dims is not None})
