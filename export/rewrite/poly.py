"""Integer polynomials over named non-negative sizes and indices: what shapes and index tensors are computed in."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

Monomial = tuple[str, ...]
"""Sorted symbol names, a repeated name being a power; the empty tuple is the constant term."""


@dataclass(frozen=True)
class Poly:
    """A polynomial with integer coefficients; every symbol stands for an integer >= 0 (a size or an index).

    Two polynomials are equal only where they are the same function of their symbols, so `==` is a proof.
    """

    terms: tuple[tuple[Monomial, int], ...] = ()

    @classmethod
    def of(cls, value: int | Poly) -> Poly:
        return value if isinstance(value, Poly) else cls._from({(): int(value)})

    @classmethod
    def symbol(cls, name: str) -> Poly:
        return cls._from({(name,): 1})

    @classmethod
    def _from(cls, terms: Mapping[Monomial, int]) -> Poly:
        return cls(tuple(sorted((monomial, factor) for monomial, factor in terms.items() if factor)))

    def __add__(self, other: int | Poly) -> Poly:
        terms = dict(self.terms)
        for monomial, factor in Poly.of(other).terms:
            terms[monomial] = terms.get(monomial, 0) + factor
        return Poly._from(terms)

    def __neg__(self) -> Poly:
        return Poly(tuple((monomial, -factor) for monomial, factor in self.terms))

    def __sub__(self, other: int | Poly) -> Poly:
        return self + -Poly.of(other)

    def __mul__(self, other: int | Poly) -> Poly:
        terms: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in Poly.of(other).terms:
                monomial = tuple(sorted(left + right))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return Poly._from(terms)

    def divided_by(self, other: Poly) -> Poly | None:
        """`self / other` where that is exact for every positive value of the symbols; None where it is not."""
        if len(other.terms) != 1:
            return Poly.of(1) if self == other and other.terms else None
        ((divisor, factor),) = other.terms
        terms: dict[Monomial, int] = {}
        for monomial, value in self.terms:
            rest = list(monomial)
            for name in divisor:
                if name not in rest:
                    return None
                rest.remove(name)
            if value % factor:
                return None
            terms[tuple(rest)] = value // factor
        return Poly._from(terms)

    @property
    def constant(self) -> int | None:
        """The value where no symbol is left, else None."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and self.terms[0][0] == () else None

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(name for monomial, _ in self.terms for name in monomial)

    @property
    def is_nonnegative(self) -> bool:
        """Whether >= 0 is certain: no negative coefficient (symbols are never negative)."""
        return all(factor > 0 for _, factor in self.terms)

    def substitute(self, values: Mapping[str, Poly]) -> Poly:
        """Replace symbols, all at once."""
        if not self.symbols & values.keys():
            return self
        total = Poly()
        for monomial, factor in self.terms:
            total += product(values.get(name, Poly.symbol(name)) for name in monomial) * factor
        return total


def product(values: Iterable[Poly]) -> Poly:
    return reduce(lambda a, b: a * b, values, Poly.of(1))


def parse(text: str) -> Poly:
    """A dimension's name as written by an exporter: `seq`, `4*batch`, `past + seq`, `((batch*seq)//batch)`.

    Anything else (`Min(128, seq)`) becomes one opaque symbol, which is equal to itself only.
    """
    try:
        return _parse(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError):
        return Poly.symbol(text)


def _parse(tree: ast.expr) -> Poly:
    match tree:
        case ast.Constant(value=int() as value):
            return Poly.of(value)
        case ast.Name(id=name):
            return Poly.symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_parse(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _parse(left) + _parse(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _parse(left) - _parse(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _parse(left) * _parse(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if 0 <= power < 8:
            return product([_parse(left)] * power)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            quotient = _parse(left).divided_by(_parse(right))
            if quotient is not None:
                return quotient
    raise ValueError(ast.dump(tree))
