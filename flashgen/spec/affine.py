"""Affine forms over the integers, and what can be proven of them for every q and all lengths.

An expression is read as a sum of rational multiples of atoms: symbols, floors, Max, Min, and whatever else is
not a sum. The proofs are sound and incomplete: False means unproven.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import sympy
from sympy import Eq, Expr, Ge, Gt, Le, Lt, Max, Min, Piecewise, S
from sympy.core.function import AppliedUndef
from sympy.functions.elementary.piecewise import ExprCondPair
from sympy.logic.boolalg import BooleanAtom

from flashgen.spec.functions import floor_quotient, modulo
from flashgen.spec.symbols import BATCH, HEAD, HEAD_KV, SEQLEN_KV, SEQLEN_Q, Q

_NEVER_NEGATIVE = (SEQLEN_Q, SEQLEN_KV, BATCH, HEAD, HEAD_KV)


class TooManyCasesError(Exception):
    """A proof's budget is spent."""


class Budget:
    """A bound on work that can grow exponentially with the min and max in an expression."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def spend(self) -> None:
        """Raises TooManyCasesError once the budget is spent."""
        self._left -= 1
        if self._left < 0:
            raise TooManyCasesError


def linear(expr: Expr) -> dict[Expr, sympy.Rational]:
    """``{atom: coefficient}``, with the constant under atom 1, and a remainder written as a - b*floor(a/b).

    Only the sum itself is opened, and products with it, not what stands inside its atoms, so that the work
    stays linear.
    """
    terms: dict[Expr, sympy.Rational] = {}
    pending = [(S.One, expr)]
    while pending:
        factor, term = pending.pop()
        coefficient, atom = term.as_coeff_Mul(rational=True)
        if isinstance(atom, sympy.Add):
            pending.extend((factor * coefficient, part) for part in atom.args)
            continue
        if isinstance(atom, modulo | sympy.Mod):
            dividend, divisor = atom.args
            pending.append((factor * coefficient, dividend))
            pending.append((factor * coefficient, -divisor * floor_quotient(dividend, divisor)))
            continue
        if isinstance(atom, sympy.Mul) and any(isinstance(part, sympy.Add) for part in atom.args):
            multiplied = sympy.expand_mul(atom, deep=False)
            if isinstance(multiplied, sympy.Add):
                pending.append((factor * coefficient, multiplied))
                continue
        terms[atom] = terms.get(atom, S.Zero) + factor * coefficient
        if terms[atom] == 0:
            del terms[atom]
    return terms


def total(terms: Mapping[Expr, sympy.Rational]) -> Expr:
    """The sum that `linear` took apart."""
    return sympy.Add(*[coefficient * atom for atom, coefficient in terms.items()])


def is_whole(expr: Expr) -> bool:
    """Whether it is an integer; sympy does not see that n*floor(q/n) is one."""
    match expr:
        case sympy.floor():
            return True
        case sympy.Add() | sympy.Mul() | Max() | Min() | sympy.Abs() | modulo():
            return all(is_whole(arg) for arg in expr.args)
        case Piecewise():
            return all(is_whole(value) for value, _ in expr.args)
    return expr.is_integer is True


def is_integral(expr: sympy.Basic) -> bool:
    """Whether it is made of integers only, with no real function or real symbol anywhere in it."""
    allowed = (
        sympy.Add, sympy.Mul, sympy.Rational, sympy.floor, Max, Min, sympy.Abs, Piecewise, ExprCondPair,
        modulo, sympy.Rel, sympy.And, sympy.Or, sympy.Not, BooleanAtom,
    )  # fmt: skip
    for part in sympy.preorder_traversal(expr):
        if isinstance(part, sympy.Symbol | AppliedUndef):
            known = part.is_integer is True
        elif isinstance(part, sympy.Pow):
            known = part.exp.is_Integer
        else:
            known = isinstance(part, allowed)
        if not known:
            return False
    return True


def floor(expr: Expr) -> Expr:
    """Greatest integer that is no more."""
    return expr if is_whole(expr) else sympy.floor(expr)


def ceiling(expr: Expr) -> Expr:
    """Least integer that is no less, in terms of floor."""
    terms = linear(expr)
    if not all(map(is_whole, terms)):
        return -sympy.floor(-total(terms))
    denominator = _denominator(terms)
    return floor(total(terms) + sympy.Rational(denominator - 1, denominator))


def _denominator(terms: Mapping[Expr, sympy.Rational]) -> int:
    return math.lcm(*[int(coefficient.q) for coefficient in terms.values()])


def branches(atom: Expr) -> tuple[Expr, ...]:
    """What a Max or a Min chooses from, an absolute value being ``Max(a, -a)``; empty for any other atom."""
    if isinstance(atom, sympy.Abs):
        return (atom.args[0], -atom.args[0])
    return tuple(atom.args) if isinstance(atom, Max | Min) else ()


class Prover:
    """What is known of the symbols, and what follows from it.

    `least` holds the least values of runtime integers. `sorted_reads` are the names of tensors that are
    nondecreasing along their last axis. Lengths and the numbers of batch and head are never negative.
    `extremes` are the first and last value of symbols that are bounded by others.
    """

    def __init__(
        self,
        least: Mapping[sympy.Symbol, int],
        sorted_reads: Iterable[str],
        budget: Budget,
        extremes: Mapping[sympy.Symbol, tuple[Expr, Expr]] | None = None,
    ) -> None:
        self.budget = budget
        self.sorted_reads = frozenset(sorted_reads)
        self.slopes: dict[sympy.Symbol, int | None] = {}  # of symbols that stand for something else
        self._extremes = dict(extremes or {})
        self._least = {**dict.fromkeys(_NEVER_NEGATIVE, 0), **least}
        self._shift = {symbol: symbol + value for symbol, value in self._least.items() if value}

    def nonnegative(self, expr: Expr) -> bool:
        """Is ``expr >= 0`` proven?"""
        return self._at_least(expr, S.Zero)

    def positive(self, expr: Expr) -> bool:
        """Is ``expr > 0`` proven?"""
        terms = linear(expr)
        if not all(map(is_whole, terms)):
            return False
        return self._at_least(expr, sympy.Rational(1, _denominator(terms)))

    def sign(self, factor: Expr) -> int | None:
        """1 or -1 where a product of constants and powers of known symbols is never 0; None: unknown."""
        sign = 1
        for part in sympy.Mul.make_args(factor):
            base, exponent = part.as_base_exp()
            if part.is_Rational and part != 0:
                sign *= 1 if part > 0 else -1
            elif not (exponent.is_Integer and self._least.get(base, 0) >= 1):
                return None
        return sign

    def _at_least(self, expr: Expr, least: sympy.Rational) -> bool:
        self.budget.spend()
        terms = linear(expr)
        for atom, coefficient in terms.items():
            factor, core = self._core(atom)
            if core is None:
                continue
            rest = total({other: c for other, c in terms.items() if other != atom})
            factor *= coefficient
            if isinstance(core, sympy.floor):
                # (N - D + 1)/D <= floor(N/D) <= N/D for integers; otherwise only x - 1 <= floor(x)
                above, below = sympy.fraction(sympy.together(core.args[0]))
                whole = is_whole(above) and is_whole(below) and self.sign(below) == 1
                slack = S.Zero if coefficient < 0 else 1 - 1 / below if whole else S.One
                return self._at_least(rest + factor * (core.args[0] - slack), least)
            if isinstance(core, Piecewise):
                return all(self._at_least(rest + factor * value, least) for value, _ in core.args)
            choices = branches(core)
            if isinstance(core, sympy.Abs) and coefficient > 0:
                choices = (*choices, S.Zero)
            proofs = (self._at_least(rest + factor * choice, least) for choice in choices)
            return all(proofs) if isinstance(core, Min) == (coefficient > 0) else any(proofs)
        for symbol, (first, last) in self._extremes.items():
            if coefficient := terms.pop(symbol, S.Zero):
                terms = linear(total(terms) + coefficient * (first if coefficient > 0 else last))
        if self._shift:
            terms = linear(total(terms).xreplace(self._shift))
        constant = terms.pop(S.One, S.Zero)
        return bool(constant >= least) and all(c > 0 and self._never_negative(a) for a, c in terms.items())

    def _core(self, atom: Expr) -> tuple[Expr, Expr | None]:
        """A product as a factor that is never negative and what has to be looked into; None where nothing."""
        parts = sympy.Mul.make_args(atom)
        cores = [part for part in parts if branches(part) or isinstance(part, sympy.floor | Piecewise)]
        if len(cores) != 1:
            return S.One, None
        factor = sympy.Mul(*[part for part in parts if part is not cores[0]])
        return (factor, cores[0]) if self.sign(factor) == 1 else (S.One, None)

    def _never_negative(self, atom: Expr) -> bool:
        """Of a product, after the known symbols were replaced by what they exceed their least value by."""
        for part in sympy.Mul.make_args(atom):
            base, exponent = part.as_base_exp()
            if not exponent.is_Integer:
                return False
            known = all(c > 0 and (a == 1 or a in self._least) for a, c in linear(base).items())
            if not known or (exponent < 0 and linear(base).get(S.One, S.Zero) <= 0):
                return False
        return True

    def settled(self, comparison: sympy.Rel) -> bool | None:
        """Whether it holds for all that is asked about, or for none of it; None: neither is proven."""
        a, b = comparison.args
        match comparison:
            case Ge() | Gt():
                a, b = b, a
        match comparison:
            case Le() | Ge():
                holds, fails = self.nonnegative(b - a), self.positive(a - b)
            case Lt() | Gt():
                holds, fails = self.positive(b - a), self.nonnegative(a - b)
            case _:
                same = self.nonnegative(b - a) and self.nonnegative(a - b)
                apart = self.positive(b - a) or self.positive(a - b)
                holds, fails = (same, apart) if isinstance(comparison, Eq) else (apart, same)
        return True if holds else False if fails else None

    # -- growth with q

    def depends_on_q(self, expr: sympy.Basic) -> bool:
        """Whether it can differ from row to row."""
        return bool(expr.has(Q, *self.slopes))

    def nondecreasing_in_q(self, expr: Expr) -> bool:
        """Is it proven that the expression never falls as q grows?"""
        return self.slope(expr) in (0, 1)

    def slope(self, expr: Expr) -> int | None:
        """1: it never falls as q grows; -1: it never rises; 0: q is not in it; None: unknown."""
        if not self.depends_on_q(expr):
            return 0
        if expr == Q or expr in self.slopes:
            return 1 if expr == Q else self.slopes[expr]
        match expr:
            case Max() | Min() | sympy.floor():
                return _common(self.slope(arg) for arg in expr.args)
            case Piecewise():
                if any(self.depends_on_q(test) for _, test in expr.args):
                    return None
                return _common(self.slope(value) for value, _ in expr.args)
            case AppliedUndef():
                *others, last = expr.args
                if expr.func.__name__ in self.sorted_reads and not any(map(self.depends_on_q, others)):
                    return self.slope(last)
                return None
        terms = linear(expr)
        if expr in terms:  # an atom of another kind: a product, a power, a function
            parts = sympy.Mul.make_args(expr)
            moving = [part for part in parts if self.depends_on_q(part)]
            still = sympy.Mul(*[part for part in parts if part not in moving])
            sign = self.sign(still) if len(moving) == 1 else None
            inner = self.slope(moving[0]) if sign is not None and moving[0] != expr else None
            return None if inner is None or sign is None else sign * inner
        return _common(
            None if (s := self.slope(atom)) is None else (s if c > 0 else -s) for atom, c in terms.items()
        )


def _common(slopes: Iterable[int | None]) -> int | None:
    moving = set(slopes) - {0}
    return moving.pop() if len(moving) == 1 else None if moving else 0


__all__ = [
    "Budget",
    "Prover",
    "TooManyCasesError",
    "branches",
    "ceiling",
    "floor",
    "is_integral",
    "is_whole",
    "linear",
    "total",
]
