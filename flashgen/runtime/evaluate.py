"""Masks and scores on torch tensors: the one evaluator behind the float64 reference, the interpreter, and
what FlexAttention is given to be compared with.

The trees are those that the kernels are printed from. Each becomes nested closures over torch's operations:
nothing is turned into text, and torch.compile and autograd can follow. Integers are exact, divisions and
comparisons of fractions included; what has a fraction is computed in the dtype that the caller asks for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import lru_cache, reduce
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor

from flashgen.spec.functions import modulo, sigmoid

Values = Mapping[str, Tensor]
"""What symbols stand for, by name."""

Read = Callable[[str, tuple[Any, ...]], Tensor]
"""A tensor's name and the values of its subscripts (positions, int64) -> its elements, broadcast alike."""

Evaluate = Callable[[Values, Read], Any]
"""An expression's value: a tensor, or a Python number or bool where it is constant."""


def evaluate(
    expr: sympy.Basic, values: Values, *, read: Read | None = None, real: torch.dtype = torch.float64
) -> Tensor:
    """The value of a mask's condition (bool) or of a number (int64 where it is an integer, else `real`).

    Args:
        values: what the symbols stand for, by name, broadcastable, on one device; integers in int64.
        read: looks up tensors; without it the expression may read none.

    Raises `TypeError` for a function that the language does not have, `KeyError` for a symbol without a
    value.
    """
    value = evaluator(expr, real)(values, read or _no_tensors)
    if isinstance(value, Tensor):
        return value
    device = next((given.device for given in values.values()), torch.device("cpu"))
    return torch.tensor(value, dtype=real if isinstance(value, float) else None, device=device)


@lru_cache(maxsize=4096)
def evaluator(expr: sympy.Basic, real: torch.dtype) -> Evaluate:
    """The function behind `evaluate`. Raises `TypeError` for what the language does not have."""
    match expr:
        case sympy.Symbol(name=name):
            return lambda values, read: values[name]
        case sympy.logic.boolalg.BooleanAtom():
            return _constant(bool(expr))
        case sympy.Rel():
            return _comparison(expr, real)
        case sympy.And() | sympy.Or():
            join = operator.and_ if isinstance(expr, sympy.And) else operator.or_
            return _folded(join, [evaluator(arg, real) for arg in expr.args])
        case sympy.Not():
            return _applied(torch.logical_not, evaluator(expr.args[0], real))
        case sympy.ITE():
            test, then, otherwise = (evaluator(arg, real) for arg in expr.args)
            return _chosen(test, then, otherwise, real)
        case AppliedUndef():
            return _read(expr, real)
        case sympy.Expr() if expr.is_number:
            return _constant(int(expr) if is_integer(expr) else float(expr))
        case sympy.Expr() if is_integer(expr):
            return _integer(expr, real)
        case sympy.Expr():
            return _fraction(expr, real)
    raise _unknown(expr)


@lru_cache(maxsize=4096)
def is_integer(expr: sympy.Expr) -> bool:
    """Whether the language has the expression for an integer.

    sympy alone does not know of floor(sqrt(kv)), say, since to it kv may be negative and the root complex.
    """
    match expr:
        case sympy.floor():
            return True
        case sympy.Piecewise():
            return all(is_integer(value) for value, _ in expr.args)
        case sympy.Add() | sympy.Mul() | sympy.Max() | sympy.Min() | sympy.Abs() | modulo():
            return bool(expr.is_integer) or all(map(is_integer, expr.args))
        case sympy.Pow():
            return is_integer(expr.base) and expr.exp.is_Integer and bool(expr.exp >= 0)
    return bool(expr.is_integer)


def _no_tensors(name: str, subscripts: tuple[Any, ...]) -> Tensor:
    raise TypeError(f"'{name}' reads a tensor, and none is given")


def _number(expr: sympy.Expr, real: torch.dtype) -> Evaluate:
    """As a number with a fraction, whether it has one or not."""
    inner = evaluator(expr, real)
    if not is_integer(expr):
        return inner

    def value(values: Values, read: Read) -> Any:
        integer = inner(values, read)
        return integer.to(real) if isinstance(integer, Tensor) else float(integer)

    return value


def _comparison(expr: sympy.Rel, real: torch.dtype) -> Evaluate:
    compare = _COMPARISONS[expr.func]
    a, b = expr.args
    if is_integer(a) and is_integer(b):
        return _folded(compare, [evaluator(a, real), evaluator(b, real)])
    if (quotient := _integer_quotient(a - b)) is not None:
        numerator, denominator = quotient  # a/b <= 0 is a*b <= 0
        return _folded(compare, [evaluator(sympy.Mul(numerator, denominator), real), _constant(0)])
    return _folded(compare, [_number(a, real), _number(b, real)])


def _read(expr: AppliedUndef, real: torch.dtype) -> Evaluate:
    name, dtype = expr.func.__name__, torch.int64 if is_integer(expr) else real
    subscripts = [evaluator(arg, real) for arg in expr.args]
    return lambda values, read: read(name, tuple(at(values, read) for at in subscripts)).to(dtype)


def _integer(expr: sympy.Expr, real: torch.dtype) -> Evaluate:
    match expr:
        case sympy.floor(args=(inner,)):
            if (quotient := _integer_quotient(inner)) is not None:
                return _folded(_floored, [evaluator(part, real) for part in quotient])
            number = _number(inner, real)
            return lambda values, read: torch.floor(number(values, read)).to(torch.int64)
        case sympy.Pow():
            base, exponent = evaluator(expr.base, real), int(expr.exp)
            return lambda values, read: base(values, read) ** exponent
        case sympy.Add() | sympy.Mul() if not all(map(is_integer, expr.args)):
            if (quotient := _integer_quotient(expr)) is None:
                raise _unknown(expr)
            return _folded(_floored, [evaluator(part, real) for part in quotient])
    return _function(expr, real, evaluator)


def _fraction(expr: sympy.Expr, real: torch.dtype) -> Evaluate:
    if not isinstance(expr, sympy.Pow):
        return _function(expr, real, _number)
    base, exponent = _number(expr.base, real), expr.exp
    if exponent == sympy.S.Half:
        return _applied(torch.sqrt, base)
    if exponent == -1:
        return lambda values, read: 1 / base(values, read)
    if exponent.is_Rational:
        power = float(exponent)
        return lambda values, read: base(values, read) ** power
    return _folded(operator.pow, [base, _number(exponent, real)])  # how sympy writes exp(log(2)*x)


def _function(
    expr: sympy.Expr, real: torch.dtype, argument: Callable[[sympy.Expr, torch.dtype], Evaluate]
) -> Evaluate:
    """What is computed alike on integers and on others."""
    if isinstance(expr, sympy.Piecewise):
        (*chosen, (otherwise, _)) = expr.args
        result = argument(otherwise, real)
        for value, test in reversed(chosen):
            result = _chosen(evaluator(test, real), argument(value, real), result, real)
        return result
    arguments = [argument(arg, real) for arg in expr.args]
    if expr.func in _FOLDED:
        return _folded(_FOLDED[expr.func], arguments)
    if expr.func in _FUNCTIONS:
        return _applied(_FUNCTIONS[expr.func], arguments[0])
    raise _unknown(expr)


def _constant(value: float) -> Evaluate:
    return lambda values, read: value


def _applied(function: Callable[[Any], Any], argument: Evaluate) -> Evaluate:
    return lambda values, read: function(argument(values, read))


def _folded(operation: Callable[[Any, Any], Any], arguments: list[Evaluate]) -> Evaluate:
    """sympy's sums, products, choices and connectives take any number of arguments."""
    return lambda values, read: reduce(operation, [argument(values, read) for argument in arguments])


def _chosen(test: Evaluate, then: Evaluate, otherwise: Evaluate, real: torch.dtype) -> Evaluate:
    def value(values: Values, read: Read) -> Any:
        condition, a, b = test(values, read), then(values, read), otherwise(values, read)
        if not isinstance(condition, Tensor):
            return a if condition else b
        if isinstance(a, float) and isinstance(b, float):  # of which torch.where would make float32
            chosen = condition.to(real)
            return a * chosen + b * (1 - chosen)
        return torch.where(condition, a, b)

    return value


def _maximum(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    return a.clamp(min=b) if isinstance(a, Tensor) else b.clamp(min=a)


def _minimum(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    return a.clamp(max=b) if isinstance(a, Tensor) else b.clamp(max=a)


def _divided(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`//` or `%`. What stands where the divisor is 0 is not defined; torch would end with an exception."""

    def divide(a: Any, b: Any) -> Any:
        if isinstance(b, Tensor):
            return operation(a, b.masked_fill(b == 0, 1))
        return operation(a, b) if b else 0

    return divide


def _unknown(expr: sympy.Basic) -> TypeError:
    return TypeError(f"{expr.func.__name__} in '{expr}' has no value on tensors")


@lru_cache(maxsize=4096)
def _integer_quotient(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """Numerator and denominator, both integers; None where one is not."""
    numerator, denominator = sympy.fraction(sympy.together(expr))
    return (numerator, denominator) if is_integer(numerator) and is_integer(denominator) else None


_floored, _remainder = _divided(operator.floordiv), _divided(operator.mod)

_COMPARISONS: Mapping[Any, Callable[[Any, Any], Any]] = {
    sympy.Le: operator.le,
    sympy.Lt: operator.lt,
    sympy.Ge: operator.ge,
    sympy.Gt: operator.gt,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
}
_FOLDED: Mapping[Any, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Max: _maximum,
    sympy.Min: _minimum,
    sympy.Mod: _remainder,
    modulo: _remainder,
}
_FUNCTIONS: Mapping[Any, Callable[[Any], Any]] = {
    sympy.Abs: abs,
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.tanh: torch.tanh,
    sigmoid: torch.sigmoid,
}

__all__ = ["Evaluate", "Read", "Values", "evaluate", "evaluator", "is_integer"]
