"""Row bounds against the condition itself, element by element: exact, or refused."""

from __future__ import annotations

import math
from itertools import product

import pytest
import sympy
from flashgen.spec.masks import MASKS, POSITIONS, mask_bounds, mask_condition
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import And, Eq, Max, Min, Not, Or, floor

from flashgen.errors import SpecError
from flashgen.spec.bounds import RowBounds, derive_bounds
from flashgen.spec.expression import Kind, parse_expression
from flashgen.spec.functions import modulo
from flashgen.spec.symbols import KV, SEQLEN_KV, SEQLEN_Q, Q

LENGTHS = [(0, 5), (1, 1), (7, 7), (3, 11), (11, 3), (9, 0)]


def condition(text: str) -> sympy.Basic:
    return parse_expression(text, names=POSITIONS, expect=Kind.BOOLEAN)


def kept(expr: sympy.Basic, q: int, kv: int, seqlen_q: int, seqlen_kv: int) -> bool:
    """The condition at one element, by substitution."""
    values = {Q: q, KV: kv, SEQLEN_Q: seqlen_q, SEQLEN_KV: seqlen_kv}
    return bool(expr.subs(values))


def assert_exact(
    expr: sympy.Basic, bounds: RowBounds, positions: range, seqlen_q: int, seqlen_kv: int
) -> None:
    before = (0, -1)
    for q in positions:
        first, last = bounds.evaluate(q, seqlen_q, seqlen_kv)
        assert 0 <= first <= seqlen_kv and -1 <= last < max(seqlen_kv, 1)
        truth = {kv for kv in range(seqlen_kv) if kept(expr, q, kv, seqlen_q, seqlen_kv)}
        assert truth == set(range(first, last + 1)), (expr, bounds, q, seqlen_kv)
        assert first >= before[0] and last >= before[1], "the ends only move forward"
        before = first, last


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("mask", sorted(MASKS))
def test_named_masks_against_brute_force(mask: str, window: int) -> None:
    parameters = tuple((name, window) for name in MASKS[mask].parameters)
    for seqlen_q, seqlen_kv in LENGTHS:
        for start in (0, seqlen_kv - seqlen_q):  # top_left, bottom_right
            rows = range(start, start + seqlen_q)
            expr, bounds = mask_condition(mask, parameters), mask_bounds(mask, parameters)
            assert_exact(expr, bounds, rows, seqlen_q, seqlen_kv)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("true", None, None),
        ("false", None, -1),
        ("kv <= q", None, Q),
        ("kv < q", None, Q - 1),
        ("kv <= q and q - kv < 4096", Q - 4095, Q),
        ("q - 4 < kv <= q", Q - 3, Q),
        ("abs(q - kv) <= 3", Q - 3, Q + 3),
        ("kv < 2048 or kv <= q", None, Max(2047, Q)),
        ("not (kv > q)", None, Q),
        ("kv // 128 == q // 128", 128 * floor(Q / 128), 128 * floor(Q / 128) + 127),
        ("q - q % 128 <= kv <= q", 128 * floor(Q / 128), Q),
        ("2 * kv < q", None, floor(Q / 2 + sympy.Rational(1, 2)) - 1),
        ("kv >= 0 and kv < seqlen_kv", None, None),  # what every key satisfies costs nothing
        ("kv <= q + 5 or kv <= q + 9", None, Q + 9),
        ("kv <= min(q, 100) + 2", None, Min(100, Q) + 2),
        ("kv - kv % 64 <= q", None, 64 * floor(Q / 64) + 63),
    ],
)
def test_derived(text: str, first: object, last: object) -> None:
    bounds = RowBounds(*(None if end is None else sympy.sympify(end) for end in (first, last)))
    assert derive_bounds(condition(text)) == bounds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv != q", "leaves a hole"),
        ("kv < 4 or q - kv < 3", "not provably one interval"),
        ("kv <= -q", "not known to be nondecreasing in q"),
        ("kv >= q % 4", "not known to be nondecreasing in q"),
        ("kv % 2 == 0", "not affine in kv"),
        ("kv * kv <= q", "not affine in kv"),
        ("kv * q <= 8", "not affine in kv"),
        ("kv <= exp(q)", "not known to be nondecreasing"),
        ("q < 4", "does not involve kv"),
        ("kv <= q and q < 4", "does not involve kv"),
        ("abs(" * 12 + "kv - q" + ") - 3" * 12 + " < 8", "too many combinations"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        derive_bounds(condition(text))


def test_the_floor_of_a_root_is_not_taken_for_the_root() -> None:
    root = sympy.sqrt(Q)
    gap = Or(And(KV >= root, KV <= Q), KV <= floor(root) - 1)
    with pytest.raises(SpecError):
        derive_bounds(gap)


# -- random conditions: whatever is derived is exact ---------------------------------------------------------

small = st.integers(-6, 6)


@st.composite
def positions(draw: st.DrawFn) -> sympy.Expr:
    """Integer expressions in q: affine, floored, a remainder, of min and max."""
    base = draw(st.integers(-2, 3)) * Q + draw(small)
    match draw(st.sampled_from(["affine", "floor", "modulo", "max", "min", "constant"])):
        case "floor":
            return floor(base / draw(st.integers(1, 5))) * draw(st.integers(1, 5)) + draw(small)
        case "modulo":
            return base - modulo(base, draw(st.integers(1, 5)))
        case "max":
            return Max(base, draw(small))
        case "min":
            return Min(base, draw(small))
        case "constant":
            return sympy.Integer(draw(small))
    return base


@st.composite
def comparisons(draw: st.DrawFn) -> sympy.Basic:
    left = draw(
        st.sampled_from(
            [KV, KV, 2 * KV, -KV, 3 * KV, floor(KV / 3), 2 * floor((KV - 1) / 4), sympy.Abs(Q - KV)]
        )
    )
    relation = draw(st.sampled_from([sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, Eq]))
    return relation(left, draw(positions()) / draw(st.sampled_from([1, 1, 2])))


conditions = st.recursive(
    comparisons(),
    lambda inner: st.one_of(st.builds(And, inner, inner), st.builds(Or, inner, inner), st.builds(Not, inner)),
    max_leaves=3,
)


@settings(max_examples=150, deadline=None)
@given(conditions)
def test_random_conditions_are_exact_or_refused(expr: sympy.Basic) -> None:
    try:
        bounds = derive_bounds(expr)
    except SpecError:
        return
    assert_exact(expr, bounds, range(-5, 12), 9, 8)


@settings(max_examples=60, deadline=None)
@given(
    lower=st.tuples(st.integers(0, 3), st.integers(1, 4), small),
    upper=st.tuples(st.integers(0, 3), st.integers(1, 4), small),
    strict=st.booleans(),
)
def test_affine_windows_are_all_derived(
    lower: tuple[int, int, int], upper: tuple[int, int, int], strict: bool
) -> None:
    (a, b, c), (d, e, f) = lower, upper
    less = sympy.Lt if strict else sympy.Le
    expr = And(less(a * Q + c, b * KV), less(e * KV, d * Q + f))
    assert_exact(expr, derive_bounds(expr), range(-5, 12), 9, 8)


def test_evaluate_clamps_without_filling_empty_rows() -> None:
    causal = RowBounds(None, Q)
    assert causal.evaluate(-3, 10, 4) == (0, -1)
    assert causal.evaluate(9, 10, 4) == (0, 3)
    window = RowBounds(Q - 1, Q)
    assert window.evaluate(20, 30, 4) == (4, 3)
    for q, seqlen_kv in product(range(-4, 9), range(5)):
        first, last = window.evaluate(q, 9, seqlen_kv)
        assert (last < first) == (not set(range(q - 1, q + 1)) & set(range(seqlen_kv)))


def test_evaluate_is_exact_where_floats_are_not() -> None:
    big = 2**60 + 1
    assert RowBounds(None, floor(Q / 3) * 3).evaluate(big, 1, 2**62)[1] == big - big % 3
    assert math.floor(big / 3) * 3 != big - big % 3


def test_bounds_are_hashable_values() -> None:
    assert hash(RowBounds(None, Q)) == hash(RowBounds(None, sympy.Symbol("q", integer=True)))
