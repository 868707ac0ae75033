"""Masks element by element, by other means than the package's: the truth that derived tiles are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import sympy
from sympy.printing.pycode import PythonCodePrinter

from flashgen.spec.bounds import RowBounds
from flashgen.spec.derivation import MaskDerivation

_FUNCTIONS = {"floor": math.floor, "modulo": lambda a, b: a % b, "Fraction": Fraction}


class _ExactPrinter(PythonCodePrinter):  # type: ignore[misc]
    """Thirds are thirds."""

    def _print_Rational(self, expr: sympy.Rational) -> str:
        return f"Fraction({expr.p}, {expr.q})"

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        if expr.exp == -1:
            return f"Fraction(1, {self._print(expr.base)})"
        return str(super()._print_Pow(expr, rational))


_PRINTER = _ExactPrinter({"fully_qualified_modules": False, "inline": True, "allow_unknown_functions": True})


def compiled(expr: sympy.Basic, reads: Mapping[str, Callable[..., int]]) -> Callable[..., Any]:
    """The expression as Python code by sympy's own printer, taking values by name."""
    symbols = sorted(expr.free_symbols, key=str)
    named = sympy.lambdify(symbols, expr, modules=[{**_FUNCTIONS, **reads}, "math"], printer=_PRINTER)
    names = [symbol.name for symbol in symbols]
    return lambda **values: named(*[values[name] for name in names])


def interval(
    derived: MaskDerivation,
    segment: RowBounds,
    q: int,
    seqlen_q: int,
    seqlen_kv: int,
    values: Mapping[str, Any],
) -> tuple[int, int]:
    """A segment's keys at one row; the searches of prepared ranges are walks along the keys."""
    found: dict[str, int] = {}
    if derived.ranges is not None:
        segment = derived.ranges.bounds
        known = {**values, "q": q, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
        numbers = {name: value for name, value in known.items() if not callable(value)}
        reads = {name: value for name, value in known.items() if callable(value)}
        for search in derived.ranges.searches:
            wanted = compiled(search.value, reads)(**numbers)
            element = compiled(search.read, reads)
            matching = (
                kv
                for kv in range(seqlen_kv)
                if (e := element(**numbers, kv=kv)) > wanted or (search.relation == ">=" and e == wanted)
            )
            found[search.result.name] = next(matching, seqlen_kv)
    return segment.evaluate(q, seqlen_q, seqlen_kv, {**values, **found})


def assert_derived(
    condition: sympy.Basic,
    derived: MaskDerivation,
    rows: range,
    seqlen_q: int,
    seqlen_kv: int,
    values: Mapping[str, Any],
) -> None:
    """Holds a derivation to the condition at every element, and to what it promises of its segments."""
    reads = {name: value for name, value in values.items() if callable(value)}
    numbers = {name: value for name, value in values.items() if not callable(value)}
    numbers |= {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
    keeps, remains = compiled(condition, reads), compiled(derived.residual, reads)
    before: list[tuple[int, int]] = [(0, -1)] * len(derived.segments)
    for q in rows:
        truth = {kv for kv in range(seqlen_kv) if keeps(**numbers, q=q, kv=kv)}
        ends = [interval(derived, s, q, seqlen_q, seqlen_kv, values) for s in derived.segments]
        inside = {kv for first, last in ends for kv in range(first, last + 1)}
        if derived.route == "map":
            inside = {kv for kv in inside if remains(**numbers, q=q, kv=kv)}
        assert inside == truth, (condition, derived, q, seqlen_kv)
        assert all(0 <= first <= seqlen_kv and -1 <= last < max(seqlen_kv, 1) for first, last in ends)
        for (first, last), (earlier_first, earlier_last) in zip(ends, before, strict=True):
            assert first >= earlier_first and last >= earlier_last, "ends only move forward"
        before = ends
        assert_ascending(ends)


def assert_ascending(ends: Sequence[tuple[int, int]]) -> None:
    firsts = [first for first, last in ends if first <= last]
    assert firsts == sorted(firsts)
