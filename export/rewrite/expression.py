"""Tensors as functions of their indices: small expressions that simplify until a mask is recognisable.

A Boolean or number at index (#0, #1, ...) of a tensor is an expression over `Poly` of those index symbols and of
dimension names. Every constructor below returns an equal, simpler expression; nothing is approximated, so what an
expression reduces to is a proof for every size at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from export.rewrite.poly import Poly


@dataclass(frozen=True)
class Number:
    """A floating-point constant."""

    value: float


@dataclass(frozen=True)
class Truth:
    """A Boolean constant."""

    value: bool


@dataclass(frozen=True)
class AtLeastZero:
    """`poly >= 0`."""

    poly: Poly


@dataclass(frozen=True)
class IsZero:
    """`poly == 0`."""

    poly: Poly


@dataclass(frozen=True)
class All:
    """Every part holds; parts are never `Truth` or `All`."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Negation:
    """The part does not hold."""

    part: Expression


@dataclass(frozen=True)
class Choice:
    """`yes` where the condition holds, else `no`."""

    condition: Expression
    yes: Expression
    no: Expression


Expression: TypeAlias = Poly | Number | Truth | AtLeastZero | IsZero | All | Negation | Choice


class NotUnderstoodError(Exception):
    """An expression outside of this calculus; caught where the caller can keep the tensor as it is."""


def index(axis: int) -> Poly:
    """The index along an axis."""
    return Poly.symbol(f"#{axis}")


def at_least_zero(poly: Poly) -> Expression:
    if poly.is_nonnegative:
        return Truth(True)
    return Truth(False) if (-poly - 1).is_nonnegative else AtLeastZero(poly)


def is_zero(poly: Poly) -> Expression:
    if poly.constant is not None:
        return Truth(poly.constant == 0)
    return Truth(False) if (poly - 1).is_nonnegative or (-poly - 1).is_nonnegative else IsZero(poly)


def both(left: Expression, right: Expression) -> Expression:
    parts: list[Expression] = []
    for side in (left, right):
        if side == Truth(False):
            return side
        if side != Truth(True):
            parts += [part for part in (side.parts if isinstance(side, All) else (side,)) if part not in parts]
    if not parts:
        return Truth(True)
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def negate(expression: Expression) -> Expression:
    match expression:
        case Truth(value):
            return Truth(not value)
        case Negation(part):
            return part
        case AtLeastZero(poly):  # integers: not (p >= 0) is -p - 1 >= 0
            return at_least_zero(-poly - 1)
        case Choice(condition, yes, no):
            return choose(condition, negate(yes), negate(no))
    return Negation(expression)


def either(left: Expression, right: Expression) -> Expression:
    return negate(both(negate(left), negate(right)))


def choose(condition: Expression, yes: Expression, no: Expression) -> Expression:
    if isinstance(condition, Truth):
        return yes if condition.value else no
    if yes == no:
        return yes
    if (yes, no) == (Truth(True), Truth(False)):
        return condition
    if (yes, no) == (Truth(False), Truth(True)):
        return negate(condition)
    if isinstance(yes, Poly) and isinstance(no, Poly) and isinstance(condition, AtLeastZero):
        # `x <= 0` picks the first of two pieces that meet there: one formula serves both (arange with -1 put in front)
        first = next((name for name in condition.poly.symbols if condition.poly == -Poly.symbol(name)), None)
        if first is not None and yes.substitute({first: Poly()}) == no.substitute({first: Poly()}):
            return no
    return Choice(condition, yes, no)


def substitute(expression: Expression, values: Mapping[str, Poly]) -> Expression:
    """Replace symbols, all at once, and simplify again."""
    match expression:
        case Poly():
            return expression.substitute(values)
        case AtLeastZero(poly):
            return at_least_zero(poly.substitute(values))
        case IsZero(poly):
            return is_zero(poly.substitute(values))
        case All(parts):
            result: Expression = Truth(True)
            for part in parts:
                result = both(result, substitute(part, values))
            return result
        case Negation(part):
            return negate(substitute(part, values))
        case Choice(condition, yes, no):
            return choose(substitute(condition, values), substitute(yes, values), substitute(no, values))
    return expression


def symbols(expression: Expression) -> frozenset[str]:
    match expression:
        case Poly():
            return expression.symbols
        case AtLeastZero(poly) | IsZero(poly):
            return poly.symbols
        case All(parts):
            return frozenset().union(*map(symbols, parts))
        case Negation(part):
            return symbols(part)
        case Choice(condition, yes, no):
            return symbols(condition) | symbols(yes) | symbols(no)
    return frozenset()


def combine(operation: Callable[[Expression, Expression], Expression], a: Expression, b: Expression) -> Expression:
    """Apply an elementwise operation below the choices of both operands."""
    if isinstance(a, Choice):
        return choose(a.condition, combine(operation, a.yes, b), combine(operation, a.no, b))
    if isinstance(b, Choice):
        return choose(b.condition, combine(operation, a, b.yes), combine(operation, a, b.no))
    return operation(a, b)


def arithmetic(name: str) -> Callable[[Expression, Expression], Expression]:
    """`Add`, `Sub` or `Mul` of two numbers."""

    def apply(a: Expression, b: Expression) -> Expression:
        if isinstance(a, Poly) and isinstance(b, Poly):
            return a + b if name == "Add" else a - b if name == "Sub" else a * b
        x, y = _number(a), _number(b)
        return Number(x + y if name == "Add" else x - y if name == "Sub" else x * y)

    return apply


def comparison(name: str) -> Callable[[Expression, Expression], Expression]:
    """`Equal`, `Less`, `LessOrEqual`, `Greater` or `GreaterOrEqual` of two numbers (or `Equal` of two Booleans)."""

    def apply(a: Expression, b: Expression) -> Expression:
        if isinstance(a, Poly) and isinstance(b, Poly):
            match name:
                case "Equal":
                    return is_zero(a - b)
                case "Less":
                    return at_least_zero(b - a - 1)
                case "LessOrEqual":
                    return at_least_zero(b - a)
                case "Greater":
                    return at_least_zero(a - b - 1)
                case _:
                    return at_least_zero(a - b)
        if name == "Equal" and isinstance(b, Truth):
            return a if b.value else negate(a)
        x, y = _number(a), _number(b)
        order = {"Equal": x == y, "Less": x < y, "LessOrEqual": x <= y, "Greater": x > y, "GreaterOrEqual": x >= y}
        return Truth(order[name])

    return apply


def _number(expression: Expression) -> float:
    if isinstance(expression, Number):
        return expression.value
    if isinstance(expression, Poly) and expression.constant is not None:
        return float(expression.constant)
    raise NotUnderstoodError(f"no number: {expression}")
