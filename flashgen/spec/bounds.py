"""From a mask's condition to the interval of keys that each row keeps.

A mask is a condition on two positions, `q` and `kv`. Where the keys that it keeps form one interval per row,
and the ends of that interval never move back as `q` grows, the whole mask is two expressions in `q`. Everything
after the spec (which tiles to visit, which need masking, the CUDA, the I/O counts) needs only those two.
`derive_bounds` finds them by solving the condition's inequalities for `kv`, over the integers, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import floor

import sympy
from sympy import And, Eq, Expr, Ge, Gt, Le, Lt, Max, Min, Ne, Not, Or, S
from sympy.logic.boolalg import Boolean

from flashgen.errors import SpecError

Q = sympy.Symbol("q", integer=True)
KV = sympy.Symbol("kv", integer=True)
SEQLEN_Q = sympy.Symbol("seqlen_q", integer=True)
SEQLEN_KV = sympy.Symbol("seqlen_kv", integer=True)

_LENGTHS = (SEQLEN_Q, SEQLEN_KV)  # never negative, which is all that is known of them


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
        first = 0 if self.first is None else floor(_evaluator(self.first)(values))
        last = seqlen_kv - 1 if self.last is None else floor(_evaluator(self.last)(values))
        return min(max(first, 0), seqlen_kv), max(min(last, seqlen_kv - 1), -1)


def derive_bounds(condition: Boolean) -> RowBounds:
    """Solve a mask's condition for `kv`.

    Understands and/or/not over comparisons that are affine in `kv` and `q` (rational coefficients), with min,
    max, abs, ``//`` and ``%`` by constants. An `or` is taken where its sides provably join into one interval.

    Raises:
        SpecError: the kept keys are not one interval per row, an end of it moves back as `q` grows, or the
            condition leaves what is understood here.
    """
    bounds = _interval(sympy.to_nnf(condition, simplify=False))
    for end, expr in (("first", bounds.first), ("last", bounds.last)):
        if expr is not None and not _nondecreasing(expr):
            raise SpecError(
                f"the {end} key that the mask keeps, {expr}, is not known to be nondecreasing in q",
                hint="flashgen skips tiles by intervals of keys whose ends only move forward from row to row",
            )
    return bounds


# -- intervals ---------------------------------------------------------------------------------------------

_ALL = RowBounds(None, None)
_NONE = RowBounds(None, S.NegativeOne)


def _interval(condition: Boolean) -> RowBounds:
    if condition == sympy.true:
        return _ALL
    if condition == sympy.false:
        return _NONE
    if isinstance(condition, And):
        result = _ALL
        for part in condition.args:
            result = _intersect(result, _interval(part))
        return result
    if isinstance(condition, Or):
        return _unite([_interval(part) for part in condition.args], condition)
    if isinstance(condition, sympy.ITE):
        test, then, otherwise = condition.args
        return _interval(sympy.to_nnf(Or(And(test, then), And(Not(test), otherwise)), simplify=False))
    if isinstance(condition, Ne):
        raise SpecError(f"'{condition}' leaves a hole in the row, so the kept keys are not one interval")
    if isinstance(condition, Eq):
        difference = condition.lhs - condition.rhs
        return _intersect(_at_most_zero(difference), _at_most_zero(-difference))
    if isinstance(condition, Le | Lt):
        return _at_most_zero(condition.lhs - condition.rhs, strict=isinstance(condition, Lt))
    if isinstance(condition, Ge | Gt):
        return _at_most_zero(condition.rhs - condition.lhs, strict=isinstance(condition, Gt))
    raise SpecError(f"no interval of keys can be derived from '{condition}'")


def _intersect(a: RowBounds, b: RowBounds) -> RowBounds:
    return _tidy(_join(Max, a.first, b.first), _join(Min, a.last, b.last))


def _join(function: type[Max] | type[Min], a: Expr | None, b: Expr | None) -> Expr | None:
    if a is None or b is None:
        return b if a is None else a
    return function(a, b)


def _unite(parts: list[RowBounds], condition: Boolean) -> RowBounds:
    """The union, where each merge leaves no gap: either interval begins at most one past the other's end.

    The hull of two such intervals is their union even where one of them, or both, are empty.
    """
    pending = list(parts)
    while len(pending) > 1:
        for i, a in enumerate(pending):
            others = [b for b in pending[i + 1 :] if _begins_within(a, b) and _begins_within(b, a)]
            if others:
                b = others[0]
                first = None if a.first is None or b.first is None else Min(a.first, b.first)
                last = None if a.last is None or b.last is None else Max(a.last, b.last)
                pending = [c for c in pending if c is not a and c is not b] + [_tidy(first, last)]
                break
        else:
            raise SpecError(f"the keys kept by '{condition}' are not provably one interval per row")
    return pending[0]


def _begins_within(a: RowBounds, b: RowBounds) -> bool:
    """Does `a` begin at most one key past the end of `b`, for every q and all lengths?"""
    return a.first is None or b.last is None or _nonnegative(b.last + 1 - a.first)


def _tidy(first: Expr | None, last: Expr | None) -> RowBounds:
    """Leave out what no key can notice: a first below 0, a last past the end."""
    if first is not None:
        first = Max(*[a for a in Max.make_args(first) if not _nonnegative(-a)] or [S.Zero])
        first = None if first == 0 else first
    if last is not None:
        kept = [a for a in Min.make_args(last) if not _nonnegative(a - SEQLEN_KV + 1)]
        last = Min(*kept) if kept else None
    return RowBounds(first, last)


# -- one inequality ----------------------------------------------------------------------------------------


def _at_most_zero(expr: Expr, *, strict: bool = False) -> RowBounds:
    """The keys for which ``expr <= 0`` (``< 0`` when strict)."""
    terms = _linear(_plain(expr))
    if not any(atom.has(KV) for atom in terms):
        return _without_kv(terms, strict=strict)
    for atom, coefficient in terms.items():
        if isinstance(atom, Max | Min) and atom.has(KV):
            rest = _total({other: c for other, c in terms.items() if other != atom})
            branches = [_at_most_zero(coefficient * arg + rest, strict=strict) for arg in atom.args]
            if isinstance(atom, Max) != (coefficient > 0):
                return _unite(branches, Lt(expr, 0) if strict else Le(expr, 0))
            result = _ALL
            for branch in branches:
                result = _intersect(result, branch)
            return result
    with_kv = [atom for atom in terms if atom.has(KV)]
    if len(with_kv) > 1 or not (with_kv[0] == KV or isinstance(with_kv[0], sympy.floor)):
        raise SpecError(f"'{_total(terms)}' is not affine in kv: no interval of keys can be derived from it")
    (unknown,) = with_kv
    coefficient = terms.pop(unknown)
    limit = _total(terms) / -coefficient
    # unknown is an integer, so unknown <= limit is unknown <= floor(limit), and < is <= ceiling(limit) - 1.
    if coefficient > 0:
        most = _ceiling(limit) - 1 if strict else _floor(limit)
        if unknown == KV:
            return _tidy(None, most)
        return _at_most_zero(unknown.args[0] - (most + 1), strict=True)  # floor(x) <= n  <=>  x < n + 1
    least = _floor(limit) + 1 if strict else _ceiling(limit)
    if unknown == KV:
        return _tidy(least, None)
    return _at_most_zero(least - unknown.args[0])  # floor(x) >= n  <=>  x >= n


def _without_kv(terms: Mapping[Expr, sympy.Rational], *, strict: bool) -> RowBounds:
    value = _total(terms)
    if _nonnegative(-value) and (not strict or _positive(-value)):
        return _ALL
    if _nonnegative(value) and (strict or _positive(value)):
        return _NONE
    raise SpecError(
        f"'{value} {'<' if strict else '<='} 0' does not involve kv: it would switch whole rows on and off",
        hint="compare kv with something in every part of the mask",
    )


def _floor(expr: Expr) -> Expr:
    return sympy.floor(_plain(expr))


def _ceiling(expr: Expr) -> Expr:
    """In terms of floor, which is what the CUDA printer and C's shifts understand."""
    terms = _linear(_plain(expr))
    if not all(atom.is_integer for atom in terms):
        return -sympy.floor(-_total(terms))
    denominator = _denominator(terms)
    return sympy.floor(_total(terms) + sympy.Rational(denominator - 1, denominator))


# -- affine forms ------------------------------------------------------------------------------------------


def _plain(expr: Expr) -> Expr:
    """The same value in terms of floor, Max and Min only."""
    expr = expr.replace(sympy.Mod, lambda a, b: a - b * sympy.floor(a / b))
    expr = expr.replace(sympy.Abs, lambda a: Max(a, -a))
    return expr.replace(sympy.ceiling, lambda a: -sympy.floor(-a))


def _linear(expr: Expr) -> dict[Expr, sympy.Rational]:
    """``{atom: coefficient}``, the constant under atom 1. Atoms are symbols, and whatever else is no sum."""
    terms: dict[Expr, sympy.Rational] = {}
    pending = [(S.One, expr)]
    while pending:
        factor, term = pending.pop()
        coefficient, atom = term.as_coeff_Mul()
        if not coefficient.is_Rational:
            coefficient, atom = S.One, term
        if isinstance(atom, sympy.Add):
            pending.extend((factor * coefficient, part) for part in atom.args)
            continue
        terms[atom] = terms.get(atom, S.Zero) + factor * coefficient
        if terms[atom] == 0:
            del terms[atom]
    return terms


def _total(terms: Mapping[Expr, sympy.Rational]) -> Expr:
    return sympy.Add(*[coefficient * atom for atom, coefficient in terms.items()])


def _denominator(terms: Mapping[Expr, sympy.Rational]) -> int:
    return int(sympy.ilcm(1, *[coefficient.q for coefficient in terms.values()]))


def _nonnegative(expr: Expr) -> bool:
    """Is ``expr >= 0`` proven, for every integer q and all lengths? False means unproven."""
    return _at_least(expr, S.Zero)


def _positive(expr: Expr) -> bool:
    """Is ``expr > 0`` proven?"""
    terms = _linear(_plain(expr))
    return _at_least(expr, sympy.Rational(1, _denominator(terms)))


def _at_least(expr: Expr, least: sympy.Rational) -> bool:
    terms = _linear(_plain(expr))
    for atom, coefficient in terms.items():
        if isinstance(atom, Max | Min):
            rest = _total({other: c for other, c in terms.items() if other != atom})
            proofs = (_at_least(rest + coefficient * arg, least) for arg in atom.args)
            return any(proofs) if isinstance(atom, Max) == (coefficient > 0) else all(proofs)
        if isinstance(atom, sympy.floor):
            # x - (D - 1)/D <= floor(x) <= x, where the denominators of x divide D
            inner = _linear(_plain(atom.args[0]))
            denominator = _denominator(inner)
            slack = sympy.Rational(denominator - 1, denominator) if coefficient > 0 else S.Zero
            rest = _total({other: c for other, c in terms.items() if other != atom})
            return _at_least(rest + coefficient * (_total(inner) - slack), least)
    constant = terms.pop(S.One, S.Zero)
    return constant >= least and all(atom in _LENGTHS and c > 0 for atom, c in terms.items())


def _nondecreasing(expr: Expr) -> bool:
    return _slope(_plain(expr)) in (0, 1)


def _slope(expr: Expr) -> int | None:
    """1 where the expression never falls as q grows, -1 where it never rises, 0 without q, None: unknown."""
    if not expr.has(Q):
        return 0
    if expr == Q:
        return 1
    if isinstance(expr, Max | Min | sympy.floor):
        slopes = {_slope(arg) for arg in expr.args} - {0}
    else:
        terms = _linear(expr)
        if expr in terms:  # an atom of another kind: a product, a power, a function
            return None
        slopes = {None if (s := _slope(a)) is None else (s if c > 0 else -s) for a, c in terms.items()} - {0}
    return slopes.pop() if len(slopes) == 1 else None


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
    parts = [_evaluator(arg) for arg in expr.args]
    if isinstance(expr, sympy.floor):
        (inner,) = parts
        return lambda values: floor(inner(values))
    if isinstance(expr, sympy.Add):
        return lambda values: sum(part(values) for part in parts)
    if isinstance(expr, sympy.Mul):
        return lambda values: _product(part(values) for part in parts)
    if isinstance(expr, Max):
        return lambda values: max(part(values) for part in parts)
    if isinstance(expr, Min):
        return lambda values: min(part(values) for part in parts)
    raise SpecError(f"cannot evaluate '{expr}' as an integer bound")


def _product(factors: Iterable[_Number]) -> _Number:
    result: _Number = 1
    for factor in factors:
        result *= factor
    return result


__all__ = ["KV", "SEQLEN_KV", "SEQLEN_Q", "Q", "RowBounds", "derive_bounds"]
