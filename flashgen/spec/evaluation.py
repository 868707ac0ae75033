"""Expressions of the language on numbers: Python's own, or numpy arrays that broadcast against each other.

Integers stay integers: a quotient under a floor is divided as such, never in floats. Real functions are
computed in float64.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import lru_cache, partial, reduce
from typing import Any

import numpy as np
import sympy
from sympy.core.function import AppliedUndef

from flashgen.errors import SpecError
from flashgen.spec.affine import is_whole
from flashgen.spec.functions import modulo, sigmoid

Values = Mapping[str, Any]
"""By name: numbers or arrays for symbols; for a tensor, a function from its subscripts to its element."""

_Evaluator = Callable[[Values], Any]


def evaluate(expr: sympy.Basic, values: Values) -> Any:
    """The expression's value: a number, a truth value, or an array of them.

    Raises:
        SpecError: it holds what the language does not have.
        KeyError: a name has no value.
    """
    # log(0) is -inf here as in the kernels; a warning would name a line of this file to whoever wrote a mask.
    with np.errstate(all="ignore"):
        return _evaluator(expr)(values)


@lru_cache(maxsize=2048)
def _evaluator(expr: sympy.Basic) -> _Evaluator:
    """Nested closures: a thousand times faster than `subs`."""
    if isinstance(expr, sympy.Symbol | AppliedUndef):
        return _named(expr)
    if expr in (sympy.true, sympy.false):
        truth = bool(expr)
        return lambda values: truth
    if isinstance(expr, sympy.Number | sympy.NumberSymbol):
        number = int(expr) if expr.is_Integer else float(expr)
        return lambda values: number
    if isinstance(expr, sympy.floor):
        return _floor(expr.args[0])
    if isinstance(expr, sympy.Piecewise):
        return _choice(tuple(expr.args))
    if isinstance(expr, sympy.ITE):
        test, then, otherwise = expr.args
        return _choice(((then, test), (otherwise, sympy.true)))
    if isinstance(expr, sympy.Rel) and any(not n.is_integer for n in expr.atoms(sympy.Rational)):
        expr = _without_fractions(expr)
    if isinstance(expr, sympy.Pow):
        base, exponent = _evaluator(expr.base), expr.exp
        power = int(exponent) if exponent.is_Integer and exponent > 0 else float(exponent)
        return lambda values: np.asarray(base(values), float) ** power if power < 0 else base(values) ** power
    operation = _OPERATIONS.get(expr.func)
    if operation is None:
        raise SpecError(f"'{expr.func.__name__}' is not part of the expression language")
    parts = tuple(_evaluator(arg) for arg in expr.args)
    return lambda values: operation(*[part(values) for part in parts])


def _named(expr: sympy.Basic) -> _Evaluator:
    if isinstance(expr, sympy.Symbol):
        name = expr.name
        return lambda values: values[name]
    name = expr.func.__name__
    subscripts = tuple(_evaluator(arg) for arg in expr.args)
    return lambda values: values[name](*[subscript(values) for subscript in subscripts])


def _floor(inner: sympy.Expr) -> _Evaluator:
    above, below = sympy.fraction(sympy.together(inner))
    if is_whole(above) and is_whole(below):
        numerator, denominator = _evaluator(above), _evaluator(below)
        return lambda values: _divided(operator.floordiv, numerator(values), denominator(values))
    real = _evaluator(inner)
    return lambda values: np.floor(real(values)).astype(np.int64)


def _divided(operation: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """A quotient or a remainder of integers; what stands where the divisor is 0 is not defined: numpy's 0."""
    if not isinstance(b, np.ndarray | np.generic):
        return operation(a, b) if b else 0
    return operation(a, b)


def _without_fractions(comparison: sympy.Rel) -> sympy.Rel:
    """Over the common denominator, where it is a number: thirds of integers compare exactly then."""
    above, below = sympy.fraction(sympy.together(comparison.lhs - comparison.rhs))
    return comparison.func(above, 0, evaluate=False) if below.is_Integer and below > 0 else comparison


def _choice(branches: tuple[tuple[sympy.Basic, sympy.Basic], ...]) -> _Evaluator:
    *pairs, (last, _) = branches
    otherwise = _evaluator(last)
    chosen = [(_evaluator(test), _evaluator(value)) for value, test in pairs]

    def choose(values: Values) -> Any:
        result = otherwise(values)
        for test, value in reversed(chosen):
            result = _where(test(values), value(values), result)
        return result

    return choose


def _where(test: Any, then: Any, otherwise: Any) -> Any:
    return np.where(test, then, otherwise) if isinstance(test, np.ndarray) else (then if test else otherwise)


def _folded(plain: Callable[..., Any], array: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Python's own function of many on its numbers, numpy's of two on arrays."""
    return lambda *args: (
        reduce(array, args) if any(isinstance(arg, np.ndarray) for arg in args) else plain(*args)
    )


_OPERATIONS: Mapping[Any, Callable[..., Any]] = {
    sympy.Add: lambda *args: reduce(operator.add, args),
    sympy.Mul: lambda *args: reduce(operator.mul, args),
    sympy.Max: _folded(max, np.maximum),
    sympy.Min: _folded(min, np.minimum),
    sympy.Abs: abs,
    modulo: partial(_divided, operator.mod),
    sympy.Mod: partial(_divided, operator.mod),
    sympy.exp: np.exp,
    sympy.log: np.log,
    sympy.tanh: np.tanh,
    sigmoid: lambda x: 1 / (1 + np.exp(-x)),
    sympy.Le: operator.le,
    sympy.Lt: operator.lt,
    sympy.Ge: operator.ge,
    sympy.Gt: operator.gt,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.And: lambda *args: reduce(operator.and_, args),
    sympy.Or: lambda *args: reduce(operator.or_, args),
    sympy.Not: np.logical_not,
}

__all__ = ["Values", "evaluate"]
