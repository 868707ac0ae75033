"""Intervals of keys, and the comparisons that they come from, solved for `kv` over the integers, exactly.

A condition becomes a tree of and/or over half-lines of keys (``kv >= e``, ``kv <= e``), guards (comparisons
without kv, which switch whole rows) and comparisons that nothing is derived from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
from sympy import And, Eq, Expr, Ge, Gt, Le, Lt, Min, Ne, Not, Or, Piecewise, S
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from flashgen.spec.affine import (
    Prover,
    TooManyCasesError,
    branches,
    ceiling,
    floor,
    is_integral,
    is_whole,
    linear,
    total,
)
from flashgen.spec.symbols import KV, SEQLEN_KV


@dataclass(frozen=True)
class RowBounds:
    """The keys that the row at position `q` keeps: those with ``first <= kv <= last``.

    Both ends are integer expressions without `KV`, nondecreasing in `Q`; None is no bound on that side.
    """

    first: Expr | None
    last: Expr | None

    def evaluate(
        self, q: int, seqlen_q: int, seqlen_kv: int, values: Mapping[str, Any] | None = None
    ) -> tuple[int, int]:
        """The interval at one row, cut to the keys that exist; the row is empty where ``last < first``.

        `values` are by name those of what else the ends hold: ``batch``, ``head``, ``head_kv``, runtime
        parameters; for a tensor, a function from its subscripts to the element.

        `first` is clamped to [0, seqlen_kv] and `last` to [-1, seqlen_kv - 1]: one further than the keys on
        the far side, so that clamping can neither fill an empty row nor empty a filled one.
        """
        from flashgen.spec.evaluation import evaluate  # with numpy, which reading a spec does not wait for

        known = {"q": q, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv, **(values or {})}
        first = 0 if self.first is None else int(evaluate(self.first, known))
        last = seqlen_kv - 1 if self.last is None else int(evaluate(self.last, known))
        return min(max(first, 0), seqlen_kv), max(min(last, seqlen_kv - 1), -1)


@dataclass(frozen=True)
class Search:
    """The least kv at which a sorted tensor is ``>= value`` or ``> value``; seqlen_kv where there is none.

    `read` is the element at `KV`, as in the condition: ``doc(BATCH, KV)``. `value` is an integer expression
    that never falls as q grows. `result` is the symbol that stands for the key found.
    """

    result: sympy.Symbol
    read: Expr
    relation: Literal[">=", ">"]
    value: Expr


@dataclass(frozen=True)
class Guard:
    """A comparison without kv: it keeps all keys of a row or none.

    `slope` is 0 where it is the same for all rows, 1 where it can only cease to hold as q grows, -1 where it
    can only begin to.
    """

    condition: Boolean
    slope: int


@dataclass(frozen=True)
class AllOf:
    """Kept where every part keeps."""

    parts: tuple[Tree, ...] = ()


@dataclass(frozen=True)
class AnyOf:
    """Kept where some part keeps."""

    parts: tuple[Tree, ...] = ()


@dataclass(frozen=True)
class Opaque:
    """A comparison that nothing is derived from."""


Tree = AllOf | AnyOf | RowBounds | Guard | Opaque
EVERYTHING, NOTHING = AllOf(), AnyOf()


class ConditionReader:
    """Reads a condition as a tree over half-lines of keys.

    Understands comparisons that are affine in `kv`, with coefficients that are rational or products of
    runtime integers known to be positive, with min, max, abs, where, ``//`` and ``%``; and comparisons of a
    sorted tensor's element at `kv` with anything free of kv, which become `searches`. Comparisons that
    `of_elements` settles, a prover that knows where scores lie, say nothing.
    """

    def __init__(self, prover: Prover, of_elements: Prover) -> None:
        self.prover = prover
        self.of_elements = of_elements
        self.searches: dict[tuple[Expr, str, Expr], Search] = {}

    def read(self, condition: Boolean) -> Tree:
        """Of a condition in negation normal form."""
        if condition == sympy.true:
            return EVERYTHING
        if condition == sympy.false:
            return NOTHING
        match condition:
            case And():
                return AllOf(tuple(self.read(part) for part in condition.args))
            case Or():
                return AnyOf(tuple(self.read(part) for part in condition.args))
            case sympy.ITE(args=(test, then, otherwise)):
                return self._chosen(((then, test), (otherwise, S.true)))
            case Le() | Lt() | Ge() | Gt() | Eq() | Ne():
                return self._comparison(condition)
        return Opaque()

    def _chosen(self, cases: Sequence[tuple[Boolean, Boolean]]) -> Tree:
        """The condition of the first case whose test holds."""
        parts: list[Tree] = []
        before: list[Boolean] = []
        for kept, test in cases:
            parts.append(self.read(sympy.to_nnf(And(*before, test, kept), simplify=False)))
            before.append(Not(test))
        return AnyOf(tuple(parts))

    def _comparison(self, comparison: sympy.Rel) -> Tree:
        self.prover.budget.spend()
        if (settled := self._settled(comparison)) is not None:
            return EVERYTHING if settled else NOTHING
        if choice := self._choice_of_rows(comparison):
            cases = [(comparison.xreplace({choice: value}), test) for value, test in choice.args]
            return self._chosen(cases)
        a, b = comparison.args
        if (
            not comparison.has(KV)
            and not self.prover.depends_on_q(comparison)
            and isinstance(comparison, Eq | Ne)
        ):
            return Guard(comparison, 0) if is_integral(comparison) else Opaque()
        match comparison:
            case Le():
                return self.at_most_zero(a - b)
            case Lt():
                return self.at_most_zero(a - b, strict=True)
            case Ge():
                return self.at_most_zero(b - a)
            case Gt():
                return self.at_most_zero(b - a, strict=True)
            case Eq():
                return AllOf((self.at_most_zero(a - b), self.at_most_zero(b - a)))
        return AnyOf((self.at_most_zero(a - b, strict=True), self.at_most_zero(b - a, strict=True)))

    def _settled(self, comparison: sympy.Rel) -> bool | None:
        try:
            return self.of_elements.settled(comparison)
        except TooManyCasesError:
            return None

    def _choice_of_rows(self, comparison: sympy.Rel) -> Piecewise | None:
        """A `where` that has to be taken apart: one with kv in it, or with a test that rows differ in."""
        for choice in sympy.ordered(comparison.atoms(Piecewise)):
            if choice.has(KV) or any(self.prover.depends_on_q(test) for _, test in choice.args):
                return choice
        return None

    def at_most_zero(self, expr: Expr, *, strict: bool = False) -> Tree:
        """The keys for which ``expr <= 0`` (``< 0`` when strict)."""
        self.prover.budget.spend()
        terms = linear(expr)
        with_kv = [atom for atom in terms if atom.has(KV)]
        if not with_kv:
            return self._without_kv(total(terms), strict=strict)
        for atom in with_kv:
            factor, core = _split(atom)
            if choices := branches(core):
                coefficient = terms.pop(atom) * factor
                sign, rest = self.prover.sign(coefficient), total(terms)
                if sign is None:
                    return Opaque()
                parts = tuple(
                    self.at_most_zero(coefficient * choice + rest, strict=strict) for choice in choices
                )
                return AnyOf(parts) if isinstance(core, Min) == (sign > 0) else AllOf(parts)
        factor, core = _split(with_kv[0])
        coefficient = terms.pop(with_kv[0]) * factor
        sign = self.prover.sign(coefficient)
        if len(with_kv) > 1 or sign is None or not is_whole(core):
            return Opaque()
        return self._beyond(core, linear_expand(total(terms) / -coefficient), sign, strict=strict)

    def _beyond(self, core: Expr, limit: Expr, sign: int, *, strict: bool) -> Tree:
        """``core <= limit`` for a sign of 1, ``core >= limit`` for -1; without equality where strict."""
        # The core is an integer: "<= limit" is "<= floor(limit)", "< limit" is "<= ceiling(limit) - 1".
        if sign > 0:
            integer = ceiling(limit) - 1 if strict else floor(limit)
        else:
            integer = floor(limit) + 1 if strict else ceiling(limit)
        if not is_integral(integer):
            return Opaque()
        if isinstance(core, sympy.floor):
            if sign > 0:
                return self.at_most_zero(
                    core.args[0] - (integer + 1), strict=True
                )  # floor(x) <= n: x < n + 1
            return self.at_most_zero(integer - core.args[0])  # floor(x) >= n: x >= n
        if core == KV:
            return self._half_line(integer, sign)
        if isinstance(core, AppliedUndef) and core.func.__name__ in self.prover.sorted_reads:
            if core.args[-1] != KV or any(arg.has(KV) for arg in core.args[:-1]):
                return Opaque()
            if sign > 0:
                return self._half_line(self._search(core, ">", integer) - 1, sign)
            return self._half_line(self._search(core, ">=", integer), sign)
        return Opaque()

    def _half_line(self, end: Expr, sign: int) -> Tree:
        """What no key can notice is left out: a first below 0, a last past the end."""
        prove = self.prover
        if sign > 0:
            if prove.nonnegative(end - SEQLEN_KV + 1):
                return EVERYTHING
            return NOTHING if prove.positive(-end) else RowBounds(None, end)
        if prove.nonnegative(-end):
            return EVERYTHING
        return NOTHING if prove.nonnegative(end - SEQLEN_KV) else RowBounds(end, None)

    def _search(self, read: Expr, relation: Literal[">=", ">"], value: Expr) -> sympy.Symbol:
        key = (read, relation, value)
        if key not in self.searches:
            result = sympy.Symbol(f"key_found{len(self.searches)}", integer=True)
            rows_differ = self.prover.depends_on_q(read)  # each row then searches keys of its own
            self.prover.slopes[result] = None if rows_differ else self.prover.slope(value)
            self.searches[key] = Search(result, read, relation, value)
        return self.searches[key].result

    def _without_kv(self, value: Expr, *, strict: bool) -> Tree:
        prove = self.prover
        if (prove.positive if strict else prove.nonnegative)(-value):
            return EVERYTHING
        if (prove.nonnegative if strict else prove.positive)(value):
            return NOTHING
        slope, terms = prove.slope(value), linear(value)
        # q / w is a quotient of integers, and no integer: it lies between 0 and 1 too
        if slope is None or not is_integral(value) or not all(map(is_whole, terms)):
            return Opaque()
        return Guard(_canonical(terms, strict=strict), slope)


def _split(atom: Expr) -> tuple[Expr, Expr]:
    """A product as a factor without kv and the one part that has it; the whole where several have."""
    parts = sympy.Mul.make_args(atom)
    inside = [part for part in parts if part.has(KV)]
    if len(inside) != 1:
        return S.One, atom
    return sympy.Mul(*[part for part in parts if part is not inside[0]]), inside[0]


def _canonical(terms: dict[Expr, sympy.Rational], *, strict: bool) -> Boolean:
    """The comparison of a sum with 0 over the integers, as ``a <= n`` or as ``a > n``.

    In this form a condition and its opposite are each other's negation.
    """
    scale = math.lcm(*[int(c.q) for c in terms.values()])
    limit = -scale * terms.pop(S.One, S.Zero) - (1 if strict else 0)
    first = next(iter(sympy.ordered(terms)))
    side = total({atom: scale * c for atom, c in terms.items()})
    return Le(side, limit) if terms[first] > 0 else Gt(-side, -limit - 1)


def linear_expand(expr: Expr) -> Expr:
    """Sums multiplied out, remainders written with floor."""
    return total(linear(expr))


__all__ = [
    "EVERYTHING",
    "NOTHING",
    "AllOf",
    "AnyOf",
    "ConditionReader",
    "Guard",
    "Opaque",
    "RowBounds",
    "Search",
    "Tree",
]
