"""Routes of masks: which one, with what segments; and every derivation against the condition itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, get_args

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_truth import assert_derived
from stopwatch import within
from sympy import ITE, And, Eq, Max, Min, Ne, Not, Or, Piecewise, floor

from flashgen.plan.tiles import Align, row_shift
from flashgen.spec.bounds import RowBounds
from flashgen.spec.derivation import MAX_SEGMENTS, MaskDerivation, derive_mask, prepared_bounds
from flashgen.spec.expression import Kind, parse_expression
from flashgen.spec.functions import modulo
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.symbols import BATCH, HEAD, KV, MASK_VARIABLES, SEQLEN_KV, Q

RUNTIME = (RuntimeParameter("chunk", "int", 1), RuntimeParameter("size", "int", 0))
INPUTS = (
    TensorInput("doc", ("batch", "kv"), "int32", sorted=True),
    TensorInput("loose", ("batch", "kv"), "int32"),
    TensorInput("limit", ("batch",), "int32"),
    TensorInput("local", ("head",), "bool"),
    TensorInput("keep", ("q", "kv"), "bool"),
    TensorInput("rank", ("q", "kv"), "int32", sorted=True),
)
CHUNK, SIZE = (parameter.symbol for parameter in RUNTIME)
LENGTHS = [(7, 7), (3, 11), (11, 3), (9, 0)]


def condition(text: str) -> sympy.Basic:
    names = {**MASK_VARIABLES, **{parameter.name: parameter.symbol for parameter in RUNTIME}}
    tensors = {tensor.name: tensor for tensor in INPUTS}
    return parse_expression(text, names=names, tensors=tensors, expect=Kind.BOOLEAN)


def derive(expr: sympy.Basic, align: Align = "bottom_right") -> MaskDerivation:
    return derive_mask(expr, align=align, inputs=INPUTS, runtime=RUNTIME)


def near(elements: list[int], position: int) -> int:
    return elements[min(max(position, 0), len(elements) - 1)] if elements else 0


def values(batch: int, head: int, chunk: int, size: int) -> dict[str, Any]:
    doc = [[0, 0, 1, 1, 1, 4, 4, 7, 9, 9, 9], [-2, -2, -2, 0, 3, 3, 3, 3, 3, 5, 6]]
    loose = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4]]
    return {
        "batch": batch,
        "head": head,
        "head_kv": head // 2,
        "chunk": chunk,
        "size": size,
        "doc": lambda b, at: near(doc[b], at),
        "loose": lambda b, at: near(loose[b], at),
        "limit": lambda b: [4, 9][b],
        "local": lambda h: [0, 1, 1, 0][h],
        "keep": lambda q, kv: (q * 3 + kv * 5) % 7 < 3,
        "rank": lambda q, kv: near(loose[0], q) + near(doc[0], kv),
    }


SITUATIONS = [values(0, 0, 1, 0), values(1, 1, 3, 2), values(0, 3, 4, 7), values(1, 2, 100, 1)]


def assert_exact(expr: sympy.Basic, lengths: Sequence[tuple[int, int]] = LENGTHS) -> None:
    """With the rows where either alignment has them."""
    for align in get_args(Align):
        derived = derive(expr, align)
        for (seqlen_q, seqlen_kv), known in product(lengths, SITUATIONS):
            start = row_shift(align, seqlen_q, seqlen_kv)
            assert_derived(expr, derived, range(start, start + seqlen_q), seqlen_q, seqlen_kv, known)


# -- routes ------------------------------------------------------------------------------------------------


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
        ("kv >= 0 and kv < seqlen_kv", None, None),  # what every key satisfies costs nothing
        ("kv <= q + 5 or kv <= q + 9", None, Q + 9),
        ("kv <= q or kv > q", None, None),
        ("kv <= q and kv <= q + 3 and kv < seqlen_kv", None, Q),
        ("kv // chunk == q // chunk and kv <= q", CHUNK * floor(Q / CHUNK), Q),
        ("q - kv < size and kv <= q", Q - SIZE + 1, Q),
        ("kv < limit[batch]", None, sympy.Function("limit", integer=True)(BATCH) - 1),
        ("where(head < 4, kv <= q, kv <= q + 9)", None, Piecewise((Q, HEAD <= 3), (Q + 9, True))),
        ("head < 4 or q - kv < 9", Piecewise((0, HEAD <= 3), (Q - 8, True)), None),
    ],
)
def test_one_interval(text: str, first: object, last: object) -> None:
    derived = derive(condition(text))
    ends = (None if end is None else sympy.sympify(end) for end in (first, last))
    assert (derived.route, derived.segments) == ("bounds", (RowBounds(*ends),))
    assert derived.residual == sympy.true and derived.ranges is None
    assert_exact(condition(text))


@pytest.mark.parametrize("align", get_args(Align))
@pytest.mark.parametrize(
    ("text", "bottom_right", "top_left"),
    [
        ("kv % 8 < 8", True, True),
        ("(q + kv) % 3 >= 0 and kv <= seqlen_kv", True, True),
        ("kv // 4 * 4 <= kv and kv % chunk < chunk", True, True),
        ("q >= seqlen_kv - seqlen_q", True, None),  # q_index >= 0
        ("q < seqlen_kv", True, None),
        ("q >= 0", None, True),
        ("q < seqlen_q", None, True),
        ("q - kv < seqlen_kv", True, None),
        ("q - kv < seqlen_q", None, True),
        ("abs(kv - seqlen_kv) > 0", True, True),
        ("where(q % 2 == 0, kv, 0) >= 0", True, True),
        ("kv % 8 == 8 or kv < 0", False, False),
        ("kv % 8 != 9", True, True),
        ("kv % 8 < 7", None, None),
        ("kv > 0", None, None),
    ],
)
def test_what_holds_of_all_scores_costs_nothing(
    text: str, bottom_right: bool | None, top_left: bool | None, align: Align
) -> None:
    whole = {True: (RowBounds(None, None),), False: (RowBounds(None, sympy.S.NegativeOne),)}
    expected = bottom_right if align == "bottom_right" else top_left
    derived = derive(condition(text), align)
    if expected is None:
        assert derived.segments not in whole.values() or derived.residual != sympy.true
    else:
        assert derived == MaskDerivation("bounds", whole[expected])
    assert_exact(condition(text))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("kv != q", 2),
        ("kv < 4 or q - kv < 3", 2),
        ("(kv < 4 or q - kv < 3) and kv <= q", 2),
        ("kv == 1 or kv == 3 or kv == 5 or kv == 7", 4),
        ("abs(q - kv) > 2", 2),
        ("abs(q - kv) <= 2 or kv < 2 or q < 2", 3),
        ("q < 4", 1),
        ("q >= 4 and kv <= q", 1),
        ("q < limit[batch] and kv < limit[batch]", 1),
        ("q < 5 and kv <= 2 or q >= 5 and kv >= 3", 2),
        ("kv // chunk == q // chunk or kv // chunk == q // chunk - 2", 2),
        ("kv <= q and (local[head] or q - kv < 3)", 1),
        ("local[head] and q - kv < 2 or not local[head] and kv <= q", 1),
        ("head == 2 or kv <= q", 1),
        ("max(q, 3) // 2 == kv // 2", 1),
        ("max(q, 3) // 2 != kv // 2", 2),
        ("kv <= q and where(q < 3, kv < 2, kv > 3)", 2),
    ],
)
def test_a_few_intervals(text: str, count: int) -> None:
    derived = derive(condition(text))
    assert (derived.route, len(derived.segments)) == ("bounds", count)
    assert_exact(condition(text))


@pytest.mark.parametrize(
    "text",
    [
        "doc[q] == doc[kv]",
        "doc[kv] <= doc[q] and q - kv < 4",
        "doc[q] == doc[kv] and kv // chunk == q // chunk",
        "doc[q] - doc[kv] < 3 and kv <= q",
        "2 * doc[kv] > doc[q]",
        "doc[kv] >= limit[batch]",
        "doc[kv] == doc[q] and kv < limit[batch]",
        "doc[kv] == doc[q] and q >= 2",
    ],
)
def test_sorted_tensors_are_ranges(text: str) -> None:
    derived = derive(condition(text))
    assert derived.route == "ranges" and derived.ranges is not None and derived.over == {"batch"}
    assert derived.segments == (prepared_bounds(derived.over),)
    assert_exact(condition(text))


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("(q - kv) % 2 == 0 and kv <= q", None, Q),
        (
            "abs(q // 3 - kv // 3) <= 1 and abs(q % 3 - kv % 3) <= 1",
            3 * floor(Q / 3) - 3,
            3 * floor(Q / 3) + 5,
        ),
        ("kv <= 9 - q", None, None),
        ("kv % 4 < 2", None, None),
        ("kv // 65536 // 65536 >= q and kv <= q", None, Q),  # 2^32 * q is beyond int32
        ("rank[q, kv] <= 5", None, None),  # sorted, but each row in its own way
        ("loose[q] == loose[kv] and kv <= q", None, Q),
        ("keep[q, kv]", None, None),
        ("kv <= loose[q]", None, None),
        ("kv * kv <= q", None, None),
        ("doc[q] == doc[kv] or kv < 2", None, None),
        ("doc[kv] == loose[kv] and kv < 5", None, 4),
        ("doc[kv] <= 9 - doc[q]", None, None),
        ("q % 3 == 0 and kv <= q", None, Q),
        ("kv == 1 or kv == 3 or kv == 5 or kv == 7 or kv == 9", 1, 9),
        ("kv <= sqrt(q * q)", None, None),
        ("(kv % 2 == 0 and kv <= q) or kv <= q - 3", None, Q),
    ],
)
def test_all_else_is_a_map(text: str, first: object, last: object) -> None:
    derived = derive(condition(text))
    ends = (None if end is None else sympy.sympify(end) for end in (first, last))
    assert (derived.route, derived.segments) == ("map", (RowBounds(*ends),))
    assert_exact(condition(text))


def test_the_residual_is_what_the_hull_does_not_say() -> None:
    derived = derive(condition("kv <= q and q - kv < 9 and (q - kv) % 2 == 0"))
    assert derived.segments == (RowBounds(Q - 8, Q),)
    assert derived.residual == condition("(q - kv) % 2 == 0")


@pytest.mark.parametrize(
    ("text", "over"),
    [
        ("kv <= q", set()),
        ("kv < limit[batch]", {"batch"}),
        ("head < 4 or kv <= q", {"head"}),
        ("head_kv < 4 and doc[q] == doc[kv]", {"batch", "head"}),
    ],
)
def test_what_a_mask_tells_apart(text: str, over: set[str]) -> None:
    assert derive(condition(text)).over == over


@pytest.mark.parametrize(
    "text",
    [
        "abs(" * 5 + "kv - q" + ") - 3" * 5 + " < 8",
        "max(" * 5 + "kv" + ", q) // 2" * 5 + " == q",
        " and ".join(
            "max(kv*2 + 3, q*3, 5) + max(kv*4, q, 7) + max(kv*5, 2*q) <= seqlen_kv" for _ in range(3)
        ),
        " and ".join(f"(kv < {n} or kv > q + {n})" for n in range(0, 14, 2)),
        " or ".join(f"(kv > {n} and kv < q - {n} and q > {n})" for n in range(5)),
        "min(" * 5 + "kv, q) + abs(kv - 3), 2 * q)" + ", kv + 1)" * 3 + " > max(q, kv - 3)",
    ],
)
def test_every_condition_has_a_route_in_a_second(text: str) -> None:
    with within(1):
        expr = condition(text)
        derived = derive(expr)
    assert len(derived.segments) <= MAX_SEGMENTS
    assert_exact(expr, [(7, 7)])


def test_the_floor_of_a_root_is_not_taken_for_the_root() -> None:
    root = sympy.sqrt(Q)
    gap = Or(And(KV >= root, KV <= Q), KV <= floor(root) - 1)
    assert derive(gap).route == "map"


# -- random conditions ---------------------------------------------------------------------------------------

small = st.integers(-6, 6)
doc, loose, limit, local, keep, rank = (tensor.function for tensor in INPUTS)


@st.composite
def positions(draw: st.DrawFn) -> sympy.Expr:
    """Integer expressions without kv: affine in q, floored, remainders, min, max, parameters and reads."""
    base = draw(st.integers(-2, 3)) * Q + draw(small)
    match draw(
        st.sampled_from(
            ["affine", "floor", "chunk", "modulo", "max", "min", "constant", "size", "read", "where"]
        )
    ):
        case "floor":
            return floor(base / draw(st.integers(1, 5))) * draw(st.integers(1, 5)) + draw(small)
        case "chunk":
            return floor(Q / CHUNK) * CHUNK + draw(st.sampled_from([0, CHUNK - 1, -CHUNK, SIZE]))
        case "modulo":
            return base - modulo(base, draw(st.integers(1, 5)))
        case "max":
            return Max(base, draw(small))
        case "min":
            return Min(base, draw(st.sampled_from([sympy.Integer(3), SIZE, limit(BATCH), SEQLEN_KV - 2])))
        case "constant":
            return sympy.Integer(draw(small))
        case "size":
            return base + draw(st.integers(-1, 2)) * SIZE
        case "read":
            return base + draw(st.sampled_from([limit(BATCH), doc(BATCH, Q), loose(BATCH, Q)]))
        case "where":
            return Piecewise((base, draw(guards())), (Q + draw(small), True), evaluate=False)
    return base


@st.composite
def guards(draw: st.DrawFn) -> sympy.Basic:
    """Comparisons without kv."""
    sides = [Q, -Q, HEAD, modulo(Q, 3), SIZE - 3, limit(BATCH) - Q]
    size = Max(SIZE, 3)  # which may be 0, but not below a real quotient
    sides += [Q / size, (2 * Q - 3) / size, HEAD / SEQLEN_KV, limit(BATCH) / size - 1]
    side = draw(st.sampled_from(sides))
    relation = draw(st.sampled_from([sympy.Lt, sympy.Ge, Eq, Ne]))
    return draw(st.sampled_from([relation(side, draw(small)), Ne(local(HEAD), 0)]))


@st.composite
def comparisons(draw: st.DrawFn) -> sympy.Basic:
    if draw(st.integers(0, 5)) == 0:
        return draw(guards())
    left = draw(
        st.sampled_from(
            [
                KV, KV, 2 * KV, -KV, 3 * KV, floor(KV / 3), 2 * floor((KV - 1) / 4), sympy.Abs(Q - KV),
                floor(KV / CHUNK) * CHUNK, doc(BATCH, KV), -doc(BATCH, KV), loose(BATCH, KV), rank(Q, KV),
                modulo(KV, 3), Max(KV, 4), Min(KV, Q - 2),
                Piecewise((KV, KV > 3), (2 * KV, True), evaluate=False),
            ]
        )
    )  # fmt: skip
    relation = draw(st.sampled_from([sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, Eq, Ne]))
    return relation(left, draw(positions()) / draw(st.sampled_from([1, 1, 2])))


conditions = st.recursive(
    comparisons(),
    lambda inner: st.one_of(
        st.builds(And, inner, inner),
        st.builds(Or, inner, inner),
        st.builds(Not, inner),
        st.builds(ITE, inner, inner, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=250, deadline=None)
@given(
    expr=conditions,
    lengths=st.sampled_from(LENGTHS),
    situation=st.sampled_from(SITUATIONS),
    align=st.sampled_from(get_args(Align)),
)
def test_random_conditions_are_exact(
    expr: sympy.Basic, lengths: tuple[int, int], situation: dict[str, Any], align: Align
) -> None:
    seqlen_q, seqlen_kv = lengths
    start = row_shift(align, seqlen_q, seqlen_kv)
    rows = range(start, start + seqlen_q)
    assert_derived(expr, derive(expr, align), rows, seqlen_q, seqlen_kv, situation)


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
    derived = derive(expr)
    assert derived.route == "bounds" and len(derived.segments) == 1
    assert_derived(expr, derived, range(-1, 8), 9, 8, SITUATIONS[0])
