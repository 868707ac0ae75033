"""The expression language: what it reads, what it refuses and where, and that it prints back what it read."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from stopwatch import within

from flashgen.errors import Location, SpecError
from flashgen.spec.evaluation import evaluate
from flashgen.spec.expression import MAX_CHOICES, Kind, parse_expression
from flashgen.spec.functions import modulo, sigmoid
from flashgen.spec.inputs import TensorInput
from flashgen.spec.printer import to_text
from flashgen.spec.symbols import KV, SEQLEN_KV, SEQLEN_Q, Q
from flashgen.spec.syntax import MAX_CHARACTERS

X = sympy.Symbol("x", real=True)
TENSORS = {
    tensor.name: tensor
    for tensor in (
        TensorInput("doc", ("batch", "kv"), "int32"),
        TensorInput("bias", ("head", "q", "kv"), "bf16"),
        TensorInput("keep", ("kv",), "bool"),
        TensorInput("heat", (), "fp32"),
    )
}
NAMES = {"q": Q, "kv": KV, "seqlen_q": SEQLEN_Q, "seqlen_kv": SEQLEN_KV, "x": X, "size": sympy.Integer(128)}


def read(text: str, expect: Kind = Kind.BOOLEAN) -> sympy.Basic:
    return parse_expression(text, names=NAMES, tensors=TENSORS, expect=expect)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true", sympy.true),
        ("kv <= q", KV <= Q),
        ("  kv\n <=\tq ", KV <= Q),
        ("kv <= q and q - kv < 4096", sympy.And(KV <= Q, Q - KV < 4096)),
        ("q - 4 < kv <= q", sympy.And(Q - 4 < KV, KV <= Q)),
        ("not kv > q or kv == 3", sympy.Or(KV <= Q, sympy.Eq(KV, 3))),
        ("kv // 4 != -q // 4", sympy.Ne(sympy.floor(KV / 4), sympy.floor(-Q / 4))),
        ("kv % 4 < 2", modulo(KV, 4) < 2),
        ("where(q < 4, kv < 4, kv <= q)", sympy.Or(sympy.And(Q < 4, KV < 4), sympy.And(Q >= 4, KV <= Q))),
        ("kv < size", KV < 128),
    ],
)
def test_conditions(text: str, expected: sympy.Basic) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1/sqrt(size)", 1 / sympy.sqrt(128)),
        ("0.1", sympy.Rational(1, 10)),
        ("1e-3 * x", X / 1000),
        ("-x ** 2", -(X**2)),
        ("2 ** -1", sympy.Rational(1, 2)),
        ("x ** 0.5", sympy.sqrt(X)),
        ("50 * tanh(x / 50)", 50 * sympy.tanh(X / 50)),
        ("max(x, 1, exp(0)) + min(x, log(x)) - abs(-3)", sympy.Max(X, 1) + sympy.Min(X, sympy.log(X)) - 3),
        ("sigmoid(x)", sigmoid(X)),
        ("where(1 < 2, 7, x)", sympy.Integer(7)),
        ("-7 // 2", sympy.Integer(-4)),
        ("floor(-3.5)", sympy.Integer(-4)),
        ("floor(x) // 2", sympy.floor(sympy.floor(X) / 2)),
        ("floor(q + x)", Q + sympy.floor(X)),
        ("-7 % 4", sympy.Integer(1)),
    ],
)
def test_numbers(text: str, expected: sympy.Basic) -> None:
    assert read(text, Kind.REAL) == expected


def test_number_may_be_integer_but_not_the_reverse() -> None:
    assert read("q + 1", Kind.INTEGER) == Q + 1
    assert read("q + 1", Kind.REAL) == Q + 1
    with pytest.raises(SpecError, match="expected an integer, but this is a number"):
        read("q / 2", Kind.INTEGER)


def test_remainders_are_pythons() -> None:
    for a in range(-9, 10):
        for b in (-4, -1, 1, 3):
            assert read(f"{a} % ({b})", Kind.INTEGER) == a % b
            assert modulo(X, b).subs(X, a) == a % b
    # sympy.Mod gives 2*Mod(q, 3) for this
    nested = read("(2 * (q % 3)) % 3", Kind.INTEGER)
    assert [int(nested.subs(Q, q)) for q in range(6)] == [(2 * (q % 3)) % 3 for q in range(6)]


def test_quotients_of_choices_are_exact() -> None:
    divided = read("q // (2 * where(kv < 3, 49, 3))", Kind.INTEGER)
    for q in range(-300, 300):
        assert [evaluate(divided, {"q": q, "kv": kv}) for kv in (0, 3)] == [q // 98, q // 6]


@pytest.mark.parametrize("text", ["q // kv", "q % kv"])
def test_a_divisor_of_zero_stops_nothing(text: str) -> None:
    divided = read(text, Kind.INTEGER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(divided, {"q": 7, "kv": 0}) == 0
        assert evaluate(divided, {"q": 7, "kv": np.array([0, 2])})[1] == evaluate(divided, {"q": 7, "kv": 2})


def test_sigmoid_is_smooth_and_exact() -> None:
    assert float(sigmoid(sympy.Float(0.3)).evalf()) == pytest.approx(1 / (1 + math.exp(-0.3)))
    assert sympy.diff(sigmoid(2 * X), X) == 2 * sigmoid(2 * X) * (1 - sigmoid(2 * X))


@pytest.mark.parametrize(
    ("text", "column", "message", "hint"),
    [
        ("", 1, "empty", None),
        ("kv <= qq", 7, 'unknown name "qq"', "did you mean 'q'?"),
        ("kv <= seqln_kv", 7, 'unknown name "seqln_kv"', "did you mean 'seqlen_kv'?"),
        ("kv <= mx(q, 3)", 7, 'unknown function "mx"', "did you mean 'max'?"),
        ("kv <= max", 7, "'max' is a function", None),
        ("kv <= q(3)", 7, 'unknown function "q"', "allowed: min"),
        ("kv", 1, "expected a condition, but this is an integer", None),
        ("kv <= (kv <= q)", 8, "expected a number, but this is a condition", "where(condition, 1, 0)"),
        ("kv <= q and kv", 13, "expected a condition", None),
        ("where(q, 1, 2) < kv", 7, "expected a condition", None),
        ("where(q < 3, 1, true) < 3", 17, "where() has an integer on one side and a condition here", None),
        ("where(q < 3, 1) < 3", 1, "where() takes 3 arguments, not 2", None),
        ("kv < min(q)", 6, "min() takes at least 2 arguments, not 1", None),
        ("kv < sqrt(q, q)", 6, "sqrt() takes 1 argument, not 2", None),
        ("kv < min(q, kv, key=q)", 21, "min() takes no named arguments", None),
        ("kv < min(*q)", 6, "at least 2 arguments", None),
        ("kv < min(*q, 3)", 10, "this is not part of", None),
        ("kv < q // 2.5", 11, "'//' divides integers", None),
        ("kv < (q / 2) % 2", 7, "'%' divides integers", None),
        ("kv < q / 0", 10, "division by zero", None),
        ("kv < q % (1 - 1)", 11, "division by zero", None),
        ("kv < (1 - 1) ** -1", 17, "0 to a negative power", None),
        ("kv < log(0)", 6, "not a real number", None),
        ("kv < sqrt(3 - 4)", 6, "not a real number", None),
        ("kv < max(q, log(-max(q, 1)))", 6, "not a real number for all that it reads", "above 0"),
        ("1e30 * x * 1e30 < q", 1, "its constants multiply to more than 1e+38", None),
        ("1e-30 * x * 1e-30 < q", 1, "its constants multiply to less than 1e-38", None),
        ("x < 1e-39", 5, "the value is too small: at least 1e-38", None),
        ("x < floor(exp(1) - exp(1 + exp(-exp(6))))", 28, "the value is too small", None),
        ("x < (x**8)**9", 5, "its powers multiply to more than 64", None),
        ("kv < 2147483648", 6, "the integer is too large: at most 2147483647", "write 3e9"),
        ("kv < 3e9", 6, "integers are compared with more than 2147483647", None),
        ("kv * 65536 * 65536 < q", 1, "its integers multiply to more than 2147483647", None),
        ("kv / 65536 / 65536 < q", 22, "integers are compared with more than 2147483647", None),
        ("kv < (-8) ** 0.5", 6, "not a real number", None),
        ("kv < q ** kv", 11, "exponent must be a constant", None),
        ("kv < q ** 0.3", 11, "multiple of 1/2", "exp(b * log(a))"),
        ("kv = q", 4, "'=' is not an operator here", "write '=='"),
        ("kv < q && q < 3", 8, "'&&' is not an operator", "write 'and'"),
        ("kv < q & q < 3", 6, "this operator is not part of", "write 'and'"),
        ("kv < q | q < 3", 6, "this operator is not part of", "write 'or'"),
        ("~(kv < q)", 1, "this operator is not part of", "write 'not'"),
        ("!(kv < q)", 1, "'!' is not an operator", "write 'not'"),
        ("kv < q ^ 2", 6, "this operator is not part of", "'**'"),
        ("kv in q", 7, "'in' and 'is'", "=="),
        ("kv if q else 3", 1, "'if ... else'", "where(condition, a, b)"),
        ("(kv < q", 1, "'(' is never closed", None),
        ("kv < q)", 7, "')' closes nothing", None),
        ("(kv < q]", 8, "']' closes nothing", None),
        ("kv < 3x", 6, 'the number "3" runs into a name', None),
        ("kv < 1e3q", 6, 'the number "1e3" runs into a name', None),
        ("kv < 0x10", 6, 'the number "0" runs into a name', None),
    ],
)
def test_mistakes(text: str, column: int, message: str, hint: str | None) -> None:
    with pytest.raises(SpecError) as caught:
        read(text)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.location == Location("<expression>", 1, column)
    assert (hint or "") in (problem.hint or "")


@pytest.mark.parametrize("text", ["kv <", "kv kv", "kv < q q", "kv <= / q", "kv < [q", ", kv"])
def test_what_python_itself_cannot_split(text: str) -> None:
    """The column of these is Python's own, which differs between its versions."""
    with pytest.raises(SpecError, match=r"cannot be read from here on|never closed") as caught:
        read(text)
    (problem,) = caught.value.problems
    assert problem.location is not None and 1 <= problem.location.column <= len(text) + 1


@pytest.mark.parametrize("text", ["kv <", "kv <= q and", "not", "  kv < q + + "])
def test_what_is_missing_at_the_end_is_missing_there(text: str) -> None:
    with pytest.raises(SpecError, match="cannot be read from here on") as caught:
        read(text)
    (problem,) = caught.value.problems
    assert problem.location == Location("<expression>", 1, len(text.rstrip()) + 1)


HOSTILE = {
    "call by string": "__import__('os').system('id')",
    "import": "__import__(os)",
    "attribute": "q.__class__ < 3",
    "subscript": "q[0] < 3",
    "lambda": "(lambda: 3)() < q",
    "walrus": "(q := 3) < kv",
    "comprehension": "[q for q in kv] < 3",
    "generator": "max(q for q in kv) < 3",
    "f-string": "f'{q}' < 3",
    "bytes": "b'q' < 3",
    "triple quotes": '"""q""" < 3',
    "dict": "{1: 2} < q",
    "set": "{1} < q",
    "semicolon": "q < 1; import os",
    "comment": "q < 1 # comment",
    "statement": "import os",
    "await": "await q",
    "yield": "(yield q)",
    "starred": "max(*q, *kv) < 3",
    "None": "None",
    "Ellipsis": "...",
    "complex": "1j < q",
    "null byte": "q < 1\x00",
    "line continuation": "q \\\n < 1",
    "unicode name": "ｑ < 1",
    "unicode digit": "q < ١",
    "tower of powers": "9**9**9 < q",
    "tower of exponentials": "exp(exp(exp(exp(9)))) < q",
    "powers of next to nothing": "((((1e-30**16)**16)**16)**16)**16 < q",
    "powers of next to one": "((((1.00000001**16)**16)**16)**16)**16 < q",
    "powers of a part of x": "(((((1e-30 * x)**16)**16)**16)**16)**16 < q",
    "powers of a length": "((((((seqlen_kv + 1)**16)**16)**16)**16)**16)**16 > kv",
    "powers of logarithms": "exp(log(x) * 1e30) < 3",
    "products of next to nothing": " * ".join(["1e-30"] * 30) + " * x < q",
    "products": "*".join(["9999999999"] * 40) + " < q",
    "long integer": "q < " + "9" * (MAX_CHARACTERS - 10),
    "huge float": "q < 1e999999999",
    "10 MB of digits": "q < " + "9" * 10_000_000,
    "10 MB of brackets": "(" * 5_000_000 + ")" * 5_000_000,
    "10 MB of names": "q < " + "q + " * 2_500_000 + "q",
    "brackets": "(" * 2000 + "q" + ")" * 2000 + "<1",
    "minus signs": "-" * 4000 + "q < 1",
    "nots": "not " * 1000 + "q < 1",
    "deep calls": "abs(" * 800 + "q" + ")" * 800 + " < 1",
    "long sum": " + ".join(["q"] * 1000) + " < 1",
    "many comparisons": " and ".join(f"kv < q + {i}" for i in range(100)),
    "many choices": "kv < max(" + ", ".join(f"(q + {i}) // {i + 2}" for i in range(60)) + ")",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_refused_at_once(text: str) -> None:
    with within(1), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SpecError) as caught:
            read(text)
    (problem,) = caught.value.problems
    assert problem.location is not None and problem.location.line == 1
    assert len(str(caught.value)) < 500, "the message does not repeat the attack"
    assert str(caught.value).isprintable() or "\n    " in str(caught.value)


LARGE = {
    "choices of floors": "kv < max(" + ", ".join(f"(q + {i}) // {i + 2}" for i in range(12)) + ")",
    "nested choices": "where(q < 1, " * 4 + "q" + ", kv)" * 4 + " < 3",
    "comparisons": " and ".join(f"kv - {i} * q < {i % 5}" for i in range(16)),
    "nested remainders": "(q + kv)" + "".join(f" % {i + 3}" for i in range(25)) + " < 3",
    "powers of powers": "(((q + 1)**16 + kv)**2 + kv)**2 < 3",
    "roots": "sqrt(" * 30 + "x" + ")" * 30 + " < 8",
    "functions": "tanh(exp(" * 14 + "x" + "))" * 14 + " < 8",
    "product": "*".join(f"(q + kv + {i})" for i in range(25)) + " < 3",
}


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE.keys())
def test_the_largest_that_is_read_is_read_at_once(text: str) -> None:
    with within(2):
        assert read(text).free_symbols


# -- printing ----------------------------------------------------------------------------------------------

integers = st.recursive(
    st.one_of(st.sampled_from([Q, KV, SEQLEN_KV]), st.integers(-9, 9).map(sympy.Integer)),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda a: -a, inner),
        st.builds(sympy.Max, inner, inner),
        st.builds(sympy.Min, inner, inner),
        st.builds(sympy.Abs, inner),
        st.builds(lambda a, n: sympy.floor(a / n), inner, st.integers(1, 9)),
        st.builds(lambda a: sympy.floor(a / (SEQLEN_Q + 1)), inner),
        st.builds(modulo, inner, st.integers(1, 9).map(sympy.Integer)),
    ),
    max_leaves=5,
)
conditions = st.recursive(
    st.builds(
        lambda relation, a, b: relation(a, b),
        st.sampled_from([sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne]),
        integers,
        integers,
    ),
    lambda inner: st.one_of(
        st.builds(sympy.And, inner, inner), st.builds(sympy.Or, inner, inner), st.builds(sympy.Not, inner)
    ),
    max_leaves=4,
)
reals = st.recursive(
    st.one_of(
        st.just(X),
        st.fractions(-9, 9, max_denominator=9).map(lambda f: sympy.Rational(f.numerator, f.denominator)),
    ),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda a: 1 / (1 + sympy.exp(a)), inner),
        st.builds(sympy.tanh, inner),
        st.builds(sigmoid, inner),
        st.builds(lambda a: sympy.sqrt(1 + sympy.Abs(a)), inner),
        st.builds(
            lambda c, a, b: sympy.Piecewise((a, c), (b, True), evaluate=False), conditions, inner, inner
        ).filter(
            lambda e: isinstance(e, sympy.Piecewise) and len(e.args) == 2 and e.args[0][1] != sympy.true
        ),
    ),
    max_leaves=4,
)


def within_limits(expr: sympy.Basic) -> bool:
    """Small enough to be read back."""
    nodes = list(sympy.preorder_traversal(expr))
    choices = sum(len(n.args) for n in nodes if isinstance(n, sympy.Max | sympy.Min | sympy.Abs))
    return choices + 3 * sum(isinstance(n, sympy.Piecewise) for n in nodes) <= MAX_CHOICES


def assert_same_values(expr: sympy.Basic, back: sympy.Basic) -> None:
    """At some points, since sympy multiplies products out on the way back: 1/(2*(a + b))."""
    for q, kv in ((0, 0), (3, 5), (-7, 2), (11, -4)):
        point = {Q: q, KV: kv, SEQLEN_Q: 6, SEQLEN_KV: 9, X: sympy.Rational(q + 2 * kv, 3)}
        ours, theirs = expr.subs(point), back.subs(point)
        if isinstance(ours, sympy.Expr):
            assert abs(ours - theirs).evalf() < 1e-9, point
        else:
            assert ours == theirs, point


@settings(max_examples=100, deadline=None)
@given(conditions.filter(within_limits))
def test_conditions_print_back(expr: sympy.Basic) -> None:
    assert_same_values(expr, read(to_text(expr)))


@settings(max_examples=100, deadline=None)
@given(reals.filter(within_limits))
def test_numbers_print_back(expr: sympy.Expr) -> None:
    assert_same_values(expr, read(to_text(expr), Kind.REAL))


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("q-kv<4096 and kv<=q", "kv <= q and q - kv < 4096"),
        ("1-q>kv-2*q", "1 - q > kv - 2*q"),
        ("-q-kv<0", "-kv - q < 0"),
        ("x<doc[kv-q]-x*kv", "x < doc[batch, kv - q] - kv*x"),
        ("kv//4==q//4", "(kv // 4) == (q // 4)"),
        ("50*tanh(x/50)<1", "50*tanh(x/50) < 1"),
        ("where(q<3,q,kv)<1/3", "where(q < 3, q, kv) < 1/3"),
        ("not(kv<q or q<3) and true", "not (kv < q or q < 3)"),
        ("-2*((kv+q)*max(kv,q))<0", "-2*((kv + q)*max(kv, q)) < 0"),
        ("(kv+3)//(q+1)*2<q%7", "2*((kv + 3) // (q + 1)) < (q % 7)"),
        ("sqrt(x)*exp(1)+1/sqrt(x)<sigmoid(-x)", "exp(1)*sqrt(x) + 1/sqrt(x) < sigmoid(-x)"),
        ("where(q<kv,x,-1e30)*1e-25<x/2e20", "1e-25*where(q < kv, x, -1e+30) < 5e-21*x"),
        ("sqrt(sqrt(x))<(x**16)**3", "sqrt(sqrt(x)) < (x**16)**3"),
        ("floor(x/3)<(q+1)//2", "floor(x/3) < ((q + 1) // 2)"),
        ("doc[q]==doc[kv+1]", "doc[batch, q] == doc[batch, kv + 1]"),
        ("doc[batch,q]==doc", "doc[batch, q] == doc[batch, kv]"),
        ("bias*2<bias[q//2,kv%3]", "2*bias[head, q, kv] < bias[head, (q // 2), (kv % 3)]"),
        ("exp(log(x) / 3) < exp(x * log(x))", "exp(1/3*log(x)) < exp(x*log(x))"),
        ("q // where(keep, 2, 3) < 1", "where(keep[kv] != 0, (q // 2), (q // 3)) < 1"),
        ("x * 0.12345678901 / 3 < 1", "12345678901.0/300000000000.0*x < 1"),
        ("3e9 * x < 1e-12", "3000000000.0*x < 1/1000000000000.0"),
        ("not keep or keep[q]", "keep[kv] == 0 or keep[q] != 0"),
        ("bias[doc, kv]/heat<1", "bias[head, doc[batch, kv], kv]/heat < 1"),
    ],
)
def test_printed_form(text: str, printed: str) -> None:
    assert to_text(read(text)) == printed
    assert read(printed) == read(text)


def test_what_the_language_lacks_is_not_printed() -> None:
    with pytest.raises(SpecError, match="'sin' cannot be written"):
        to_text(sympy.sin(X))
