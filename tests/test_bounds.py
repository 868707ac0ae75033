"""Row bounds at single rows; comparisons read as half-lines of keys; what is proven of affine forms."""

from __future__ import annotations

import math
from itertools import product

import pytest
import sympy
from sympy import Min, floor

from flashgen.spec.affine import Budget, Prover, TooManyCasesError, is_whole
from flashgen.spec.bounds import AllOf, AnyOf, ConditionReader, Guard, Opaque, RowBounds
from flashgen.spec.expression import Kind, parse_expression
from flashgen.spec.inputs import TensorInput
from flashgen.spec.symbols import BATCH, HEAD, KV, MASK_VARIABLES, SEQLEN_KV, Q

CHUNK = sympy.Symbol("chunk", integer=True)
SINCE = sympy.Symbol("since", integer=True)
DOC = TensorInput("doc", ("batch", "kv"), "int32", sorted=True)


def condition(text: str) -> sympy.Basic:
    names = {**MASK_VARIABLES, "chunk": CHUNK, "since": SINCE}
    return parse_expression(text, names=names, tensors={"doc": DOC}, expect=Kind.BOOLEAN)


def prover(steps: int = 500) -> Prover:
    return Prover({CHUNK: 1, SINCE: -3}, ["doc"], Budget(steps))


def reader() -> ConditionReader:
    """Of rows and keys anywhere."""
    return ConditionReader(prover(), prover())


def read(text: str) -> object:
    return reader().read(sympy.to_nnf(condition(text), simplify=False))


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("kv <= q", RowBounds(None, Q)),
        ("kv > q", RowBounds(Q + 1, None)),
        ("kv == q", AllOf((RowBounds(None, Q), RowBounds(Q, None)))),
        ("kv != q", AnyOf((RowBounds(None, Q - 1), RowBounds(Q + 1, None)))),
        ("2 * kv < q", RowBounds(None, floor(Q / 2 + sympy.Rational(1, 2)) - 1)),
        ("kv // 8 >= q", RowBounds(8 * Q, None)),
        ("kv <= min(q, 100) + 2", RowBounds(None, Min(100, Q) + 2)),
        ("abs(q - kv) <= 3", AllOf((RowBounds(None, Q + 3), RowBounds(Q - 3, None)))),
        ("kv - kv % 64 <= q", RowBounds(None, 64 * floor(Q / 64) + 63)),
        ("kv // chunk <= q // chunk", RowBounds(None, CHUNK * floor(Q / CHUNK) + CHUNK - 1)),
        ("kv * chunk <= q", RowBounds(None, floor(Q / CHUNK))),
        ("kv >= 0", AllOf()),  # what every key satisfies says nothing
        ("kv < seqlen_kv + 3", AllOf()),
        ("kv < -2", AnyOf()),
        ("kv >= seqlen_kv", AnyOf()),
        ("chunk >= 1", AllOf()),
        ("head < 4", Guard(HEAD <= 3, 0)),
        ("head >= 4", Guard(HEAD > 3, 0)),
        ("q < 4", Guard(Q <= 3, 1)),
        ("2 * q > 9", Guard(2 * Q > 9, -1)),
        ("q % 2 == 0", AllOf((Opaque(), AllOf()))),
        ("kv % 2 == 0", AllOf((Opaque(),))),
        ("kv * kv <= q", Opaque()),
        ("kv * since <= q", Opaque()),  # may divide by zero, or turn the comparison around
        ("kv <= sqrt(q)", Opaque()),  # not in integers
    ],
)
def test_a_comparison_is_read_as_keys(text: str, tree: object) -> None:
    found = read(text)
    # q // 2 <= ... of a negated side and the order of the parts are sympy's
    if isinstance(tree, AllOf | AnyOf):
        assert type(found) is type(tree)
        assert set(found.parts) == set(tree.parts)  # type: ignore[attr-defined]
    else:
        assert found == tree


def test_sorted_tensors_are_searched() -> None:
    found = reader()
    found.read(condition("doc[kv] == doc[q]"))
    doc = DOC.function
    assert {(s.read, s.relation, s.value) for s in found.searches.values()} == {
        (doc(BATCH, KV), ">=", doc(BATCH, Q)),
        (doc(BATCH, KV), ">", doc(BATCH, Q)),
    }


# -- proofs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "seqlen_kv", "chunk - 1", "since + 3", "head * chunk", "max(q, 3) - 3", "3 - min(q, 3)", "abs(q)",
        "q - 8 * (q // 8)", "q - chunk * (q // chunk)", "chunk * (q // chunk) + chunk - 1 - q", "q % 8",
        "7 - q % 8", "chunk * max(q, 2) - 2 * chunk", "where(q < 3, 1, chunk)", "(q + 5) // 3 - q // 3 - 1",
        "batch * seqlen_q + head",
    ],
)  # fmt: skip
def test_proven_never_negative(text: str) -> None:
    assert prover().nonnegative(_integer(text))


@pytest.mark.parametrize(
    "text",
    [
        "q",
        "chunk - 2",
        "since",
        "since * chunk + 3",
        "q - 8 * (q // 8) - 1",
        "seqlen_kv - seqlen_q",
        "doc[q]",
    ],
)
def test_not_proven_never_negative(text: str) -> None:
    assert not prover().nonnegative(_integer(text))


@pytest.mark.parametrize(
    ("text", "slope"),
    [
        ("q", 1), ("-q", -1), ("seqlen_kv", 0), ("q // 8", 1), ("chunk * (q // chunk)", 1), ("max(q, 3)", 1),
        ("doc[q]", 1), ("doc[q - 3] // 2", 1), ("doc[-q]", -1), ("-chunk * q", -1),
        ("where(head < 3, q, 5)", 1),
        ("q % 8", None), ("since * q", None), ("abs(q)", None), ("max(q, -q)", None), ("q * q", None),
        ("where(q < 3, q, 5)", None), ("q // since", None),
    ],
)  # fmt: skip
def test_growth_with_q(text: str, slope: int | None) -> None:
    assert prover().slope(_integer(text)) == slope


def test_proofs_end() -> None:
    choices = sympy.Add(*[sympy.Abs(Q - n) * n for n in range(1, 14)])
    with pytest.raises(TooManyCasesError):
        prover(200).nonnegative(choices - SEQLEN_KV)


def test_a_multiple_of_a_floor_is_an_integer() -> None:
    assert is_whole(CHUNK * floor(Q / CHUNK) + 1)
    assert not is_whole(Q / CHUNK) and not is_whole(sympy.sqrt(Q))


def _integer(text: str) -> sympy.Expr:
    names = {**MASK_VARIABLES, "chunk": CHUNK, "since": SINCE}
    return parse_expression(text, names=names, tensors={"doc": DOC}, expect=Kind.INTEGER)


# -- bounds at one row -------------------------------------------------------------------------------------


def test_ends_read_what_a_call_passes() -> None:
    limit = sympy.Function("limit", integer=True)
    bounds = RowBounds(CHUNK * floor(Q / CHUNK), Min(Q, limit(BATCH)))
    values = {"chunk": 4, "batch": 1, "limit": lambda batch: [2, 9][batch]}
    assert bounds.evaluate(7, 20, 20, values) == (4, 7)
    assert bounds.evaluate(13, 20, 20, values) == (12, 9)


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
