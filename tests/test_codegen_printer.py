"""The integer printer: its text, what it refuses, and, evaluated by the CUDA compiler, its arithmetic."""

from __future__ import annotations

import itertools

import pytest
import sympy
from sympy import Abs, And, Eq, Max, Min, Mod, Not, Or, Piecewise, ceiling, floor

from flashgen.codegen import Source, cuda
from flashgen.codegen.environment import templates_dir

Q, N = sympy.symbols("q n", integer=True)

TEXT = {
    Max(0, Q - 4095): "max(q - 4095, 0)",
    Min(Q + 3, N): "min(n, q + 3)",
    Q: "q",
    sympy.Integer(-7): "-7",
    64 * floor(Q / 64) + 63: "64 * floor_div(q, 64) + 63",
    ceiling(Q / 3): "-floor_div(-q, 3)",
    Q - Mod(N, 5): "q - floor_mod(n, 5)",
    -2 * Min(Q, N): "-2 * min(n, q)",
    And(Q < N, Or(Q > 2, Not(Eq(N, 3)))): "((q > 2) || (n != 3)) && (q < n)",
    Piecewise((Q, Q < N), (N, True)): "((n > q) ? q : n)",
    sympy.true: "true",
}

VALUES = [
    *TEXT,
    Q - 4095,
    Min(Q + 3, N, 7),
    Max(Q - N, Min(Q, 4), -3),
    -Q * N + 2,
    Q**2 - 3 * Q,
    (Q + 1) * (Q - N),
    -((Q + 1) ** 3),
    Q - (N - 2 * Q) * 3,
    floor(Q / 3),
    floor((Q + 1) / 3),
    floor(Q / 4 + N / 2),
    floor(floor(Q / 2) / 3),
    floor(-Q / 5),
    -floor(-Q / 5),
    Q - floor(-Q / 5),
    ceiling((Q - 2 * N) / 7),
    Q - ceiling(Q / 3),
    Mod(Q, 3),
    Mod(Q, -3),
    2 * Mod(Q + N, 4),
    Abs(Q - N),
    Piecewise((Q, Q < N), (N, Q < 3), (Q - N, True)),
    Q <= N,
    Or(And(Q < N, Q > -4), Eq(Mod(Q, 2), 0)),
    Not(And(Q < N, Q > -4), evaluate=False),
    sympy.false,
]

REFUSED = [
    Q / 2,
    sympy.Float(2) * Q,
    sympy.sqrt(Q),
    sympy.pi * Q,
    sympy.oo,
    sympy.nan,
    1 / Q,
    2**Q,
    sympy.exp(Q),
    sympy.Function("f")(Q),
    sympy.Symbol("q; asm"),
    sympy.Symbol("ñ"),
    Piecewise((Q, Q < N)),
]


@pytest.mark.parametrize("expression", TEXT, ids=str)
def test_reads_as_one_writes_it(expression: sympy.Basic) -> None:
    assert cuda(expression) == TEXT[expression]


@pytest.mark.parametrize("expression", REFUSED, ids=str)
def test_refuses_what_has_no_integer_form(expression: sympy.Basic) -> None:
    with pytest.raises(ValueError):
        cuda(expression)


def test_plain_integers_print_and_text_does_not() -> None:
    assert cuda(3) == "3"
    with pytest.raises(sympy.SympifyError):
        cuda("__import__('os')")  # type: ignore[arg-type]


def agreement(index: int, expression: sympy.Basic) -> str:
    """C++ that compiles only if the printed expression equals the mathematics on a grid around zero."""
    grid = itertools.product(range(-7, 8), range(-5, 6))
    exact = [expression.xreplace({Q: sympy.Integer(q), N: sympy.Integer(n)}) for q, n in grid]
    expected = ", ".join(str(int(bool(x)) if x in (True, False) else int(x)) for x in exact)
    return f"""
__device__ constexpr int expected{index}[] = {{{expected}}};
__device__ constexpr int printed{index}(int q, int n) {{ return {cuda(expression)}; }}
__device__ constexpr bool agree{index}() {{
  for (int i = 0, q = -7; q <= 7; ++q)
    for (int n = -5; n <= 5; ++n, ++i)
      if (printed{index}(q, n) != expected{index}[i]) return false;
  return true;
}}
static_assert(agree{index}(), "expression {index}");
"""


@pytest.mark.compiler
def test_arithmetic_is_exact_for_every_sign() -> None:
    from flashgen.build import compile_source

    text = (
        '#include "integer.cuh"\nnamespace exact {\n'
        # The built-in ones are no constant expressions.
        "__device__ constexpr int min(int a, int b) { return a < b ? a : b; }\n"
        "__device__ constexpr int max(int a, int b) { return a > b ? a : b; }\n"
        "__device__ constexpr int abs(int a) { return a < 0 ? -a : a; }\n"
        + "".join(agreement(i, expression) for i, expression in enumerate(VALUES))
        + '}\nextern "C" __global__ void probe() {}\n'
    )
    header = (templates_dir() / "device" / "integer.cuh").read_text()
    compile_source(Source("probe", text, {"integer.cuh": header}), "sm_80")
