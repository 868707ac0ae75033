"""Typed values of the expression language, and its functions.

A constant is known in floats beside its sympy form, so that its size is known before sympy's exact arithmetic
is let loose on it.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from flashgen.spec.functions import floor_quotient, modulo, sigmoid

MAX_INTEGER = 2**31 - 1  # int32, as in kernels
MAX_REAL = 1e38  # fp32's range
MIN_REAL = 1e-38
_LARGEST = 10**38
MAX_DIGITS = 300  # of a fraction's halves, which powers of 1.0001 soon pass
MAX_EXPONENT = 16
MAX_DEGREE = 64  # of powers of powers


class Kind(Enum):
    """What an expression yields."""

    BOOLEAN = "a condition"
    INTEGER = "an integer"
    REAL = "a number"


@dataclass(frozen=True)
class Value:
    """A part of an expression.

    `number` is its value where it is a constant number; `element` the 0 or 1 behind a condition that is an
    element of a bool tensor.
    """

    expr: sympy.Basic
    kind: Kind
    number: float | None = None
    element: sympy.Expr | None = None


def symbolic(expr: sympy.Expr) -> Value:
    """A symbol's value, or a number's: an integer where sympy knows it for one, unless it is too large."""
    kind = Kind.INTEGER if expr.is_integer and not has_large_integer(expr) else Kind.REAL
    return Value(expr, kind, float(expr) if expr.is_number else None)


def has_large_integer(expr: sympy.Basic) -> bool:
    """Whether a number in it, numerator or denominator, is beyond `MAX_INTEGER`."""
    return any(max(abs(number.p), number.q) > MAX_INTEGER for number in expr.atoms(sympy.Rational))


def misfit(expr: sympy.Basic) -> str | None:
    """What makes an expression's numbers or powers more than the language holds."""
    for number in expr.atoms(sympy.Rational):
        above, below = abs(int(number.p)), int(number.q)
        if above > below * _LARGEST:
            return f"its constants multiply to more than {MAX_REAL:g}"
        if 0 < above * _LARGEST < below:
            return f"its constants multiply to less than {MIN_REAL:g}"
        if max(above, below) >= 10**MAX_DIGITS:
            return f"its constants multiply to more than {MAX_DIGITS} digits"
    if _degree(expr) > MAX_DEGREE:
        return f"its powers multiply to more than {MAX_DEGREE}"
    return None


def _degree(expr: sympy.Basic) -> sympy.Expr:
    """The power that the largest value in the expression grows with: 6 for ``(q*kv + 1)**3``."""
    match expr:
        case sympy.Pow(base=base, exp=exponent) if exponent.is_number:
            return abs(exponent) * _degree(base)
        case sympy.Mul():
            return sympy.Add(*map(_degree, expr.args))
        case AppliedUndef():
            return sympy.S.One
    return max(map(_degree, expr.args), default=sympy.S.One if expr.is_Symbol else sympy.S.Zero)


class Unfit(Exception):
    """A constant that the language does not hold; the message says why."""


def computed(compute: Callable[[], Any]) -> float:
    """A constant's value in floats.

    Raises:
        Unfit: it is no real number, or too large a one.
    """
    try:
        number = compute()
    except OverflowError:
        raise Unfit(f"the value is too large: at most {MAX_REAL:g} is understood") from None
    except ZeroDivisionError:
        raise Unfit("division by zero") from None
    except ValueError:
        raise Unfit("the value is not a real number") from None
    if isinstance(number, complex):
        raise Unfit("the value is not a real number")
    if not abs(number) <= MAX_REAL:
        raise Unfit(f"the value is too large: at most {MAX_REAL:g} is understood")
    return float(number)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@dataclass(frozen=True)
class Function:
    """A function of one number: of a sympy expression, and of a float."""

    apply: Callable[[sympy.Expr], sympy.Expr]
    compute: Callable[[float], float]
    kind: Kind = Kind.REAL


NUMERIC_FUNCTIONS: Mapping[str, Function] = {
    "sqrt": Function(sympy.sqrt, math.sqrt),
    "exp": Function(sympy.exp, math.exp),
    "log": Function(sympy.log, math.log),
    "tanh": Function(sympy.tanh, math.tanh),
    "sigmoid": Function(sigmoid, _sigmoid),
    "floor": Function(sympy.floor, math.floor, Kind.INTEGER),
}
FUNCTIONS = ("min", "max", "abs", "where", *NUMERIC_FUNCTIONS)
CONSTANTS: Mapping[str, sympy.Basic] = {"true": sympy.true, "false": sympy.false}

COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], sympy.Basic]] = {
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
}


@dataclass(frozen=True)
class Operator:
    """An operator between two numbers: as it is written, of sympy expressions, and of floats."""

    symbol: str
    apply: Callable[[Any, Any], sympy.Expr]
    compute: Callable[[Any, Any], Any]


OPERATORS: Mapping[type[ast.operator], Operator] = {
    ast.Add: Operator("+", operator.add, operator.add),
    ast.Sub: Operator("-", operator.sub, operator.sub),
    ast.Mult: Operator("*", operator.mul, operator.mul),
    ast.Div: Operator("/", operator.truediv, operator.truediv),
    ast.FloorDiv: Operator("//", floor_quotient, operator.floordiv),
    ast.Mod: Operator("%", modulo, operator.mod),
    ast.Pow: Operator("**", operator.pow, operator.pow),
}

__all__ = [
    "COMPARISONS",
    "CONSTANTS",
    "FUNCTIONS",
    "MAX_DEGREE",
    "MAX_DIGITS",
    "MAX_EXPONENT",
    "MAX_INTEGER",
    "MAX_REAL",
    "MIN_REAL",
    "NUMERIC_FUNCTIONS",
    "OPERATORS",
    "Function",
    "Kind",
    "Operator",
    "Unfit",
    "Value",
    "computed",
    "has_large_integer",
    "misfit",
    "symbolic",
]
