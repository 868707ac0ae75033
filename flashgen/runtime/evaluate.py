"""Masks and scores on torch tensors: the one evaluator behind the float64 reference and the interpreter.

The trees are those that the kernels are printed from. They are walked: nothing is turned into text or
compiled. Integers are int64 and exact, divisions and comparisons of fractions included; what has a fraction
is computed in the dtype that the caller asks for, with operations that autograd can follow.
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

Read = Callable[[AppliedUndef, tuple[Tensor, ...]], Tensor]
"""A tensor read and the values of its subscripts (positions, int64) -> what is read, broadcast alike."""


def evaluate(
    expr: sympy.Basic,
    values: Mapping[sympy.Symbol, Tensor],
    *,
    read: Read | None = None,
    real: torch.dtype = torch.float64,
) -> Tensor:
    """The value of a mask's condition (bool) or of a number (int64 where it is an integer, else `real`).

    Args:
        values: what the symbols stand for, broadcastable, all on one device; integers in int64.
        read: looks up tensor reads; without it the expression may hold none.

    Raises `TypeError` for a function that the language does not have, `KeyError` for a symbol without a
    value.
    """
    return _Evaluation(values, read, real).of(expr)


class _Evaluation:
    """One walk. Equal subexpressions are computed once."""

    def __init__(self, values: Mapping[sympy.Symbol, Tensor], read: Read | None, real: torch.dtype) -> None:
        self.values = values
        self.read = read
        self.real = real
        self.device = next((value.device for value in values.values()), torch.device("cpu"))
        self.known: dict[sympy.Basic, Tensor] = {}

    def of(self, expr: sympy.Basic) -> Tensor:
        if expr not in self.known:
            self.known[expr] = self.computed(expr)
        return self.known[expr]

    def computed(self, expr: sympy.Basic) -> Tensor:
        match expr:
            case sympy.Symbol():
                return self.values[expr]
            case sympy.logic.boolalg.BooleanAtom():
                return torch.tensor(bool(expr), device=self.device)
            case sympy.Rel():
                return self.comparison(expr)
            case sympy.And() | sympy.Or() | sympy.Not():
                return _folded(_CONNECTIVES[expr.func], [self.of(arg) for arg in expr.args])
            case sympy.ITE():
                return torch.where(*[self.of(arg) for arg in expr.args])
            case AppliedUndef():
                return self.looked_up(expr)
            case sympy.Expr() if is_integer(expr):
                return self.integer(expr)
            case sympy.Expr():
                return self.fraction(expr)
        raise _unknown(expr)

    def comparison(self, expr: sympy.Rel) -> Tensor:
        compare = _COMPARISONS[expr.func]
        a, b = expr.args
        if is_integer(a) and is_integer(b):
            return compare(self.of(a), self.of(b))
        if (quotient := _integer_quotient(a - b)) is not None:
            numerator, denominator = quotient  # a/b <= 0 is a*b <= 0
            return compare(self.of(numerator) * self.of(denominator), 0)
        return compare(self.number(a), self.number(b))

    def looked_up(self, expr: AppliedUndef) -> Tensor:
        if self.read is None:
            raise TypeError(f"{expr} reads a tensor, and none is given")
        value = self.read(expr, tuple(self.of(arg) for arg in expr.args))
        return value.to(torch.int64 if is_integer(expr) else self.real)

    def number(self, expr: sympy.Expr) -> Tensor:
        """As a number with a fraction, whether it has one or not."""
        return self.of(expr).to(self.real)

    def integer(self, expr: sympy.Expr) -> Tensor:
        if expr.is_Integer:
            return torch.tensor(int(expr), device=self.device)
        match expr:
            case sympy.floor():
                (inner,) = expr.args
                if (quotient := _integer_quotient(inner)) is not None:
                    return torch.div(*map(self.of, quotient), rounding_mode="floor")
                return torch.floor(self.number(inner)).to(torch.int64)
            case sympy.Pow() if expr.exp.is_Integer and expr.exp >= 0:
                return self.of(expr.base) ** int(expr.exp)
            case sympy.Add() | sympy.Mul() if not all(map(is_integer, expr.args)):
                if (quotient := _integer_quotient(expr)) is None:
                    raise _unknown(expr)
                return torch.div(*map(self.of, quotient), rounding_mode="floor")
        return self.function(expr, self.of)

    def fraction(self, expr: sympy.Expr) -> Tensor:
        if expr.is_number:
            return torch.tensor(float(expr), dtype=self.real, device=self.device)
        if isinstance(expr, sympy.Pow):
            return self.power(expr)
        return self.function(expr, self.number)

    def power(self, expr: sympy.Pow) -> Tensor:
        if expr.exp == sympy.S.Half:
            return torch.sqrt(self.number(expr.base))
        if expr.exp == -1:
            return 1 / self.number(expr.base)
        if expr.exp.is_Rational:
            return self.number(expr.base) ** float(expr.exp)
        result: Tensor = torch.exp(self.number(expr.exp) * torch.log(self.number(expr.base)))
        return result

    def function(self, expr: sympy.Expr, argument: Callable[[sympy.Expr], Tensor]) -> Tensor:
        """What is computed alike on integers and on others."""
        if isinstance(expr, sympy.Piecewise):
            (*chosen, (otherwise, _)) = expr.args
            result = argument(otherwise)
            for value, test in reversed(chosen):
                result = torch.where(self.of(test), argument(value), result)
            return result
        if expr.func not in _FUNCTIONS:
            raise _unknown(expr)
        return _folded(_FUNCTIONS[expr.func], [argument(arg) for arg in expr.args])


def _folded(operation: Callable[..., Tensor], arguments: list[Tensor]) -> Tensor:
    """sympy's sums, products, choices and connectives take any number of arguments."""
    return operation(arguments[0]) if len(arguments) == 1 else reduce(operation, arguments)


def _unknown(expr: sympy.Basic) -> TypeError:
    return TypeError(f"{expr.func.__name__} in '{expr}' has no value on tensors")


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


@lru_cache(maxsize=4096)
def _integer_quotient(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """Numerator and denominator, both integers; None where one is not."""
    numerator, denominator = sympy.fraction(sympy.together(expr))
    return (numerator, denominator) if is_integer(numerator) and is_integer(denominator) else None


_CONNECTIVES: Mapping[Any, Callable[..., Tensor]] = {
    sympy.And: torch.logical_and,
    sympy.Or: torch.logical_or,
    sympy.Not: torch.logical_not,
}
_COMPARISONS: Mapping[Any, Callable[[Any, Any], Tensor]] = {
    sympy.Le: operator.le,
    sympy.Lt: operator.lt,
    sympy.Ge: operator.ge,
    sympy.Gt: operator.gt,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
}
_FUNCTIONS: Mapping[Any, Callable[..., Tensor]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Max: torch.maximum,
    sympy.Min: torch.minimum,
    sympy.Abs: torch.abs,
    sympy.Mod: torch.remainder,
    modulo: torch.remainder,
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.tanh: torch.tanh,
    sigmoid: torch.sigmoid,
}

__all__ = ["Read", "evaluate", "is_integer"]
