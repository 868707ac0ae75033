"""Any text of the language at all: it is read or refused at a place, in time, and never anything else."""

from __future__ import annotations

import time
from dataclasses import replace

import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgen.errors import SpecError
from flashgen.spec.expression import Kind, Scope, read_expression
from flashgen.spec.gallery import GALLERY
from flashgen.spec.inputs import TensorInput
from flashgen.spec.printer import to_text
from flashgen.spec.symbols import SCORE_VARIABLES
from flashgen.spec.values import NUMERIC_FUNCTIONS

TENSORS = {
    tensor.name: tensor
    for tensor in (
        TensorInput("doc", ("batch", "kv"), "int32"),
        TensorInput("bias", ("head", "q", "kv"), "bf16"),
        TensorInput("keep", ("kv",), "bool"),
        TensorInput("heat", (), "fp32"),
    )
}
PARAMETERS = {"n": sympy.Symbol("n", integer=True), "x": sympy.Symbol("x", real=True)}
SCOPE = Scope({**SCORE_VARIABLES, "head_dim": sympy.Integer(64)}, PARAMETERS, TENSORS, GALLERY)

NAMED = [
    "q",
    "kv",
    "head",
    "score",
    "x",
    "n",
    "seqlen_kv",
    "head_dim",
    "doc",
    "doc[q]",
    "bias",
    "heat",
    "alibi",
]
NUMBERS = ["0", "1", "2", "7", "0.5", "3000000000", "1e9"]
functions = st.sampled_from([*NUMERIC_FUNCTIONS, "abs", "-"])
operators = st.sampled_from(["+", "-", "*", "/", "//", "%", "**"])
compared = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
numbers: st.SearchStrategy[str] = st.deferred(
    lambda: st.one_of(
        st.sampled_from(
            [
                "q",
                "kv",
                "head",
                "score",
                "x",
                "n",
                "seqlen_kv",
                "head_dim",
                "0",
                "1",
                "2",
                "7",
                "0.5",
                "3000000000",
                "1e9",
            ]
        ),
        st.sampled_from(["doc", "doc[q]", "bias", "heat", "alibi"]),
        st.builds("({} {} {})".format, numbers, operators, numbers),
        st.builds("{}({})".format, functions, numbers),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), numbers, numbers),
        st.builds("where({}, {}, {})".format, conditions, numbers, numbers),
        st.builds("softcap({})".format, numbers),
        st.builds("doc[{}]".format, numbers),
        st.builds("bias[{}, {}]".format, numbers, numbers),
    )
)
conditions: st.SearchStrategy[str] = st.deferred(
    lambda: st.one_of(
        st.sampled_from(["causal", "keep", "keep[q]", "true", "false", "document", "padding"]),
        st.builds("({} {} {})".format, numbers, compared, numbers),
        st.builds("({} {} {})".format, conditions, st.sampled_from(["and", "or"]), conditions),
        st.builds("not {}".format, conditions),
        st.builds("where({}, {}, {})".format, conditions, conditions, conditions),
        st.builds("{}({})".format, st.sampled_from(["window", "band"]), numbers),
        st.builds("keep[{}]".format, numbers),
    )
)
texts = st.one_of(
    st.tuples(conditions, st.just(Kind.BOOLEAN)),
    st.tuples(numbers, st.just(Kind.REAL)),
    st.tuples(numbers, st.just(Kind.BOOLEAN)),
)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_read_or_refused(given_text: tuple[str, Kind]) -> None:
    text, expect = given_text
    started = time.perf_counter()
    try:
        reading = read_expression(text, SCOPE, expect)
    except SpecError as error:
        (problem,) = error.problems
        assert problem.location is not None and 1 <= problem.location.column <= len(text)
        return
    finally:
        assert time.perf_counter() - started < 2
    printed = to_text(reading.expr)
    again = read_expression(printed, replace(SCOPE, tensors={**TENSORS, **reading.tensors}), expect).expr
    assert again.free_symbols == reading.expr.free_symbols
