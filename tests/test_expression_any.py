"""Any text of the language at all: it is read or refused at a place, in time, and never anything else."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import sympy
from stopwatch import within

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

VARIABLES = ["q", "kv", "head", "score", "x", "n", "seqlen_kv", "head_dim"]
NUMBERS = [
    *VARIABLES,
    "doc",
    "doc[q]",
    "bias",
    "heat",
    "alibi",
    "0",
    "1",
    "2",
    "7",
    "0.5",
    "3000000000",
    "1e9",
]
CONDITIONS = ["causal", "keep", "keep[q]", "true", "false", "document", "padding"]


def number(choose: random.Random, depth: int) -> str:
    if depth == 0:
        return choose.choice(NUMBERS)
    a, b = number(choose, choose.randrange(depth)), number(choose, choose.randrange(depth))
    function = choose.choice([*NUMERIC_FUNCTIONS, "abs", "-", "softcap"])
    forms = {
        f"({a} {choose.choice(['+', '-', '*', '/', '//', '%', '**'])} {b})": 5,
        f"{function}({a})": 3,
        f"{choose.choice(['min', 'max'])}({a}, {b})": 1,
        f"where({condition(choose, depth - 1)}, {a}, {b})": 1,
        f"doc[{a}]": 1,
        f"bias[{a}, {b}]": 1,
    }
    return choose.choices([*forms], [*forms.values()])[0]


def condition(choose: random.Random, depth: int) -> str:
    if depth == 0:
        return choose.choice(CONDITIONS)
    a, b = number(choose, depth - 1), number(choose, choose.randrange(depth))
    c, d = condition(choose, choose.randrange(depth)), condition(choose, choose.randrange(depth))
    forms = {
        f"({a} {choose.choice(['<', '<=', '>', '>=', '==', '!='])} {b})": 3,
        f"({c} {choose.choice(['and', 'or'])} {d})": 2,
        f"not {c}": 1,
        f"where({c}, {d}, {condition(choose, 0)})": 1,
        f"{choose.choice(['window', 'band'])}({a})": 1,
        f"keep[{a}]": 1,
    }
    return choose.choices([*forms], [*forms.values()])[0]


@pytest.mark.parametrize("seed", range(8))
def test_read_or_refused(seed: int) -> None:
    choose = random.Random(seed)
    read = 0
    for _ in range(150):
        expect = choose.choice([Kind.BOOLEAN, Kind.REAL])
        text = (condition if expect is Kind.BOOLEAN else number)(choose, choose.randint(1, 6))
        try:
            with within(2):
                reading = read_expression(text, SCOPE, expect)
        except SpecError as error:
            (problem,) = error.problems
            assert problem.location is not None and 1 <= problem.location.column <= len(text), text
            continue
        read += 1
        scope = replace(SCOPE, tensors={**TENSORS, **reading.tensors})
        again = read_expression(to_text(reading.expr), scope, expect).expr
        assert again.free_symbols <= reading.expr.free_symbols, text
    assert read > 30, "most texts would be refused: nothing much was tried"
