"""From a mask's condition to the interval of keys that each row keeps.

A mask is a condition on two positions, `q` and `kv`. Where the keys that it keeps form one interval per row,
and the ends of that interval never move back as `q` grows, the whole mask is two expressions in `q`: which
tiles to visit, which need masking, the CUDA and the I/O counts need no more than those. `derive_bounds` finds
them by solving the condition's inequalities for `kv`, over the integers, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from sympy import And, Eq, Expr, Ge, Gt, Le, Lt, Max, Min, Ne, Not, Or, S
from sympy.logic.boolalg import Boolean

from flashgen.errors import SpecError
from flashgen.spec.affine import (
    Budget,
    branches,
    ceiling,
    linear,
    nondecreasing_in_q,
    nonnegative,
    positive,
    total,
)
from flashgen.spec.functions import modulo
from flashgen.spec.symbols import KV, SEQLEN_KV, SEQLEN_Q, Q


@dataclass(frozen=True)
class RowBounds:
    """The keys that the row at position `q` keeps: those with ``first <= kv <= last``.

    Both ends are integer-valued expressions in `Q`, `SEQLEN_Q` and `SEQLEN_KV`, nondecreasing in `Q`; None is
    no bound on that side.
    """

    first: Expr | None
    last: Expr | None

    def evaluate(self, q: int, seqlen_q: int, seqlen_kv: int) -> tuple[int, int]:
        """The interval at one row, cut to the keys that exist; the row is empty where ``last < first``.

        `first` is clamped to [0, seqlen_kv] and `last` to [-1, seqlen_kv - 1]: one further than the keys on
        the far side, so that clamping can neither fill an empty row nor empty a filled one.
        """
        values = {Q: q, SEQLEN_Q: seqlen_q, SEQLEN_KV: seqlen_kv}
        first = 0 if self.first is None else math.floor(_evaluator(self.first)(values))
        last = seqlen_kv - 1 if self.last is None else math.floor(_evaluator(self.last)(values))
        return min(max(first, 0), seqlen_kv), max(min(last, seqlen_kv - 1), -1)


_ALL = RowBounds(None, None)
_NONE = RowBounds(None, S.NegativeOne)


def derive_bounds(condition: Boolean) -> RowBounds:
    """Solve a mask's condition for `kv`.

    Understands and/or/not over comparisons that are affine in `kv` and `q` (rational coefficients), with min,
    max, abs, ``//`` and ``%`` by constants. An `or` is taken where its sides provably join into one interval.

    Raises:
        SpecError: the kept keys are not one interval per row, an end of it moves back as `q` grows, or the
            condition leaves what is understood here.
    """
    bounds = _Solver().interval(sympy.to_nnf(condition, simplify=False))
    for end, expr in (("first", bounds.first), ("last", bounds.last)):
        if expr is not None and not nondecreasing_in_q(expr):
            raise SpecError(
                f"the {end} key that the mask keeps, {expr}, is not known to be nondecreasing in q",
                hint="tiles are skipped by intervals of keys whose ends only move forward from row to row",
            )
    return bounds


class _Solver:
    def __init__(self) -> None:
        self.budget = Budget(500)

    def interval(self, condition: Boolean) -> RowBounds:
        if condition == sympy.true:
            return _ALL
        if condition == sympy.false:
            return _NONE
        match condition:
            case And():
                return self.intersection([self.interval(part) for part in condition.args])
            case Or():
                return self.union([self.interval(part) for part in condition.args], condition)
            case sympy.ITE(args=(test, then, otherwise)):
                choice = Or(And(test, then), And(Not(test), otherwise))
                return self.interval(sympy.to_nnf(choice, simplify=False))
            case Eq(lhs=a, rhs=b):
                return self.intersection([self.at_most_zero(a - b), self.at_most_zero(b - a)])
            case Le(lhs=a, rhs=b) | Ge(lhs=b, rhs=a):
                return self.at_most_zero(a - b)
            case Lt(lhs=a, rhs=b) | Gt(lhs=b, rhs=a):
                return self.at_most_zero(a - b, strict=True)
            case Ne():
                raise SpecError(f"'{condition}' leaves a hole: the kept keys are not one interval per row")
        raise SpecError(f"no interval of keys can be derived from '{condition}'")

    def intersection(self, parts: list[RowBounds]) -> RowBounds:
        firsts = [part.first for part in parts if part.first is not None]
        lasts = [part.last for part in parts if part.last is not None]
        return self.tidy(Max(*firsts) if firsts else None, Min(*lasts) if lasts else None)

    def union(self, parts: list[RowBounds], condition: Boolean) -> RowBounds:
        """Joins intervals that leave no gap: either begins at most one key past the other's end.

        The hull of two such intervals is their union even where one of them, or both, are empty.
        """
        pending = list(parts)
        while len(pending) > 1:
            pair = next(
                (
                    (i, j)
                    for i, a in enumerate(pending)
                    for j, b in enumerate(pending[:i])
                    if self.begins_within(a, b) and self.begins_within(b, a)
                ),
                None,
            )
            if pair is None:
                raise SpecError(f"the keys kept by '{condition}' are not provably one interval per row")
            a, b = (pending.pop(i) for i in pair)
            pending.append(
                self.tidy(
                    None if a.first is None or b.first is None else Min(a.first, b.first),
                    None if a.last is None or b.last is None else Max(a.last, b.last),
                )
            )
        return pending[0]

    def begins_within(self, a: RowBounds, b: RowBounds) -> bool:
        """Does `a` begin at most one key past the end of `b`, for every q and all lengths?"""
        return a.first is None or b.last is None or nonnegative(b.last + 1 - a.first, self.budget)

    def tidy(self, first: Expr | None, last: Expr | None) -> RowBounds:
        """Leaves out what no key can notice: a first below 0, a last past the end."""
        if first is not None:
            kept = [
                part for part in Max.make_args(first) if part.has(Q) or not nonnegative(-part, self.budget)
            ]
            first = Max(*kept) if kept else None
        if last is not None:
            kept = [
                part
                for part in Min.make_args(last)
                if not part.has(SEQLEN_KV) or not nonnegative(part - SEQLEN_KV + 1, self.budget)
            ]
            last = Min(*kept) if kept else None
        return RowBounds(first, last)

    def at_most_zero(self, expr: Expr, *, strict: bool = False) -> RowBounds:
        """The keys for which ``expr <= 0`` (``< 0`` when strict)."""
        self.budget.spend()
        terms = linear(expr)
        with_kv = [atom for atom in terms if atom.has(KV)]
        if not with_kv:
            return self.without_kv(total(terms), strict=strict)
        for atom in with_kv:
            if choices := branches(atom):
                coefficient = terms.pop(atom)
                rest = total(terms)
                parts = [self.at_most_zero(coefficient * choice + rest, strict=strict) for choice in choices]
                if isinstance(atom, Min) == (coefficient > 0):
                    return self.union(parts, Lt(expr, 0) if strict else Le(expr, 0))
                return self.intersection(parts)
        unknown = with_kv[0]
        if len(with_kv) > 1 or not (unknown == KV or isinstance(unknown, sympy.floor)):
            raise SpecError(f"'{expr}' is not affine in kv: no interval of keys can be derived from it")
        coefficient = terms.pop(unknown)
        limit = total(terms) / -coefficient
        # The unknown is an integer: "<= limit" is "<= floor(limit)", "< limit" is "<= ceiling(limit) - 1".
        if coefficient > 0:
            most = ceiling(limit) - 1 if strict else sympy.floor(limit)
            if unknown == KV:
                return self.tidy(None, most)
            return self.at_most_zero(unknown.args[0] - (most + 1), strict=True)  # floor(x) <= n: x < n + 1
        least = sympy.floor(limit) + 1 if strict else ceiling(limit)
        if unknown == KV:
            return self.tidy(least, None)
        return self.at_most_zero(least - unknown.args[0])  # floor(x) >= n: x >= n

    def without_kv(self, value: Expr, *, strict: bool) -> RowBounds:
        sure = positive if strict else nonnegative
        if sure(-value, self.budget):
            return _ALL
        unsure = nonnegative if strict else positive
        if unsure(value, self.budget):
            return _NONE
        condition = f"{value} {'<' if strict else '<='} 0"
        raise SpecError(
            f"'{condition}' does not involve kv: it would switch whole rows on and off",
            hint="compare kv with something in every part of the mask",
        )


# -- evaluation on Python's integers -----------------------------------------------------------------------

_Values = Mapping[Expr, int]
_Number = int | Fraction


@lru_cache(maxsize=1024)
def _evaluator(expr: Expr) -> Callable[[_Values], _Number]:
    """Nested closures: a thousand times faster than `subs`, and exact, unlike floats."""
    if isinstance(expr, sympy.Integer):
        integer = int(expr)
        return lambda values: integer
    if isinstance(expr, sympy.Rational):
        fraction = Fraction(int(expr.p), int(expr.q))
        return lambda values: fraction
    if isinstance(expr, sympy.Symbol):
        return lambda values: values[expr]
    parts: list[Callable[[_Values], Any]] = [_evaluator(arg) for arg in expr.args]
    match expr:
        case sympy.floor():
            return lambda values: math.floor(parts[0](values))
        case modulo() | sympy.Mod():
            return lambda values: parts[0](values) % parts[1](values)
        case sympy.Abs():
            return lambda values: abs(parts[0](values))
        case sympy.Add():
            return lambda values: sum(part(values) for part in parts)
        case sympy.Mul():
            return lambda values: math.prod(part(values) for part in parts)
        case Max():
            return lambda values: max(part(values) for part in parts)
        case Min():
            return lambda values: min(part(values) for part in parts)
    raise SpecError(f"cannot evaluate '{expr}' as a bound on kv")


__all__ = ["KV", "SEQLEN_KV", "SEQLEN_Q", "Q", "RowBounds", "derive_bounds"]
