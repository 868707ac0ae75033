"""Affine forms over the integers, and what can be proven of them for every q and all lengths.

An expression is read as a sum of rational multiples of atoms: symbols, floors, Max, Min, and whatever else is
not a sum. The proofs are sound and incomplete: False means unproven.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy
from sympy import Expr, Max, Min, S

from flashgen.errors import SpecError
from flashgen.spec.functions import modulo
from flashgen.spec.symbols import SEQLEN_KV, SEQLEN_Q, Q

_LENGTHS = (SEQLEN_Q, SEQLEN_KV)  # never negative, which is all that is known of them


class Budget:
    """A bound on work that can grow exponentially with the min and max in an expression."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def spend(self) -> None:
        """Raises SpecError once the budget is spent."""
        self._left -= 1
        if self._left < 0:
            raise SpecError("the mask has too many combinations of min, max and 'or' to derive its intervals")


def linear(expr: Expr) -> dict[Expr, sympy.Rational]:
    """``{atom: coefficient}``, with the constant under atom 1, and a remainder written as a - b*floor(a/b).

    Only the sum itself is opened, not what stands inside its atoms, so that the work stays linear.
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
            pending.append((factor * coefficient, -divisor * sympy.floor(dividend / divisor)))
            continue
        terms[atom] = terms.get(atom, S.Zero) + factor * coefficient
        if terms[atom] == 0:
            del terms[atom]
    return terms


def total(terms: Mapping[Expr, sympy.Rational]) -> Expr:
    """The sum that `linear` took apart."""
    return sympy.Add(*[coefficient * atom for atom, coefficient in terms.items()])


def ceiling(expr: Expr) -> Expr:
    """Least integer that is no less, in terms of floor."""
    terms = linear(expr)
    if not all(atom.is_integer for atom in terms):
        return -sympy.floor(-total(terms))
    denominator = _denominator(terms)
    return sympy.floor(total(terms) + sympy.Rational(denominator - 1, denominator))


def _denominator(terms: Mapping[Expr, sympy.Rational]) -> int:
    return math.lcm(*[int(coefficient.q) for coefficient in terms.values()])


def branches(atom: Expr) -> tuple[Expr, ...]:
    """What a Max or a Min chooses from, an absolute value being ``Max(a, -a)``; empty for any other atom."""
    if isinstance(atom, sympy.Abs):
        return (atom.args[0], -atom.args[0])
    return tuple(atom.args) if isinstance(atom, Max | Min) else ()


def nonnegative(expr: Expr, budget: Budget) -> bool:
    """Is ``expr >= 0`` proven?"""
    return _at_least(expr, S.Zero, budget)


def positive(expr: Expr, budget: Budget) -> bool:
    """Is ``expr > 0`` proven?"""
    return _at_least(expr, sympy.Rational(1, _denominator(linear(expr))), budget)


def _at_least(expr: Expr, least: sympy.Rational, budget: Budget) -> bool:
    budget.spend()
    terms = linear(expr)
    for atom, coefficient in terms.items():
        if choices := branches(atom):
            rest = total({other: c for other, c in terms.items() if other != atom})
            proofs = (_at_least(rest + coefficient * choice, least, budget) for choice in choices)
            return all(proofs) if isinstance(atom, Min) == (coefficient > 0) else any(proofs)
        if isinstance(atom, sympy.floor):
            # x - (D - 1)/D <= floor(x) <= x where D*x is an integer; otherwise only x - 1 <= floor(x)
            inner = linear(atom.args[0])
            grain = sympy.Rational(1, _denominator(inner)) if all(a.is_integer for a in inner) else S.Zero
            slack = 1 - grain if coefficient > 0 else S.Zero
            rest = total({other: c for other, c in terms.items() if other != atom})
            return _at_least(rest + coefficient * (total(inner) - slack), least, budget)
    constant = terms.pop(S.One, S.Zero)
    return bool(constant >= least) and all(atom in _LENGTHS and c > 0 for atom, c in terms.items())


def nondecreasing_in_q(expr: Expr) -> bool:
    """Is it proven that the expression never falls as q grows?"""
    return _slope(expr) in (0, 1)


def _slope(expr: Expr) -> int | None:
    """1 where the expression never falls as q grows, -1 where it never rises, 0 without q, None: unknown."""
    if not expr.has(Q):
        return 0
    if expr == Q:
        return 1
    if isinstance(expr, Max | Min | sympy.floor):
        slopes = {_slope(arg) for arg in expr.args} - {0}
    else:
        terms = linear(expr)
        if expr in terms:  # an atom of another kind: a product, a power, a function
            return None
        slopes = {None if (s := _slope(a)) is None else (s if c > 0 else -s) for a, c in terms.items()} - {0}
    return slopes.pop() if len(slopes) == 1 else None
