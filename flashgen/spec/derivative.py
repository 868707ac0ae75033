"""Derivatives of a score: with respect to Q.K's score and to the tensors that it reads.

The result stays within the expression language, so that it prints and evaluates as the score does. sympy
differentiates the smooth functions; choices are taken apart here, because sympy's own derivatives of Max and
abs are made of Heaviside steps and of deltas. At a kink, the derivative is that of the choice that the score
takes there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import sympy
from sympy import Expr, S
from sympy.core.function import AppliedUndef

from flashgen.spec.functions import modulo
from flashgen.spec.symbols import SCORE


@dataclass(frozen=True)
class ScoreDerivatives:
    """What a backward pass multiplies the gradient of the score' with."""

    score: Expr  # d score' / d score
    reads: tuple[tuple[AppliedUndef, Expr], ...]  # each distinct read of a wanted tensor, d score' / d read


def score_derivatives(score: Expr, tensors: Collection[str]) -> ScoreDerivatives:
    """The derivatives of a score with respect to `SCORE` and to every read of the tensors so named.

    A tensor may be read at several places, with derivatives of their own: its gradient is the sum over all.
    """
    reads = sorted(
        (read for read in score.atoms(AppliedUndef) if read.func.__name__ in tensors),
        key=sympy.default_sort_key,
    )
    return ScoreDerivatives(
        score=derivative(score, SCORE), reads=tuple((read, derivative(score, read)) for read in reads)
    )


def derivative(expr: Expr, variable: Expr) -> Expr:
    """d expr / d variable, where `variable` is a real symbol or a read of a tensor of reals.

    The positions, and whatever else is an integer, do not depend on either.
    """
    return _Differentiation(variable).of(expr)


class _Differentiation:
    def __init__(self, variable: Expr) -> None:
        self.variable = variable
        self.known: dict[Expr, Expr] = {variable: S.One}

    def of(self, expr: Expr) -> Expr:
        if expr not in self.known:
            depends = not expr.is_integer and expr.has(self.variable)
            self.known[expr] = self.derived(expr) if depends else S.Zero
        return self.known[expr]

    def derived(self, expr: Expr) -> Expr:
        match expr:
            case sympy.Add():
                return sympy.Add(*map(self.of, expr.args))
            case sympy.Mul():
                return sympy.Add(*self.products(expr.args))
            case sympy.Max():
                return self.choice(expr.args, sympy.Ge)
            case sympy.Min():
                return self.choice(expr.args, sympy.Le)
            case sympy.Abs():
                (inner,) = expr.args
                return _where(inner >= 0, self.of(inner), -self.of(inner))
            case sympy.Piecewise():
                (*chosen, (otherwise, _)) = expr.args
                result = self.of(otherwise)
                for value, test in reversed(chosen):
                    result = _where(test, self.of(value), result)
                return result
            case sympy.floor() | modulo() | sympy.Mod() | AppliedUndef():  # a read has integer subscripts
                return S.Zero
            case sympy.Pow() if expr.exp.is_number:
                base = expr.base
                return expr.exp * base ** (expr.exp - 1) * self.of(base)
            case sympy.Pow() if expr.base.is_number:  # how sympy writes exp(log(2)*x)
                return expr * sympy.log(expr.base) * self.of(expr.exp)
            case sympy.Function(args=(inner,)):
                return expr.fdiff(1) * self.of(inner)
        raise TypeError(f"no derivative of {expr.func.__name__} in '{expr}'")

    def products(self, factors: tuple[Expr, ...]) -> Iterable[Expr]:
        for index, factor in enumerate(factors):
            slope = self.of(factor)
            if slope != 0:
                yield sympy.Mul(slope, *factors[:index], *factors[index + 1 :])

    def choice(self, choices: tuple[Expr, ...], beats: type[sympy.Rel]) -> Expr:
        """Of Max or Min: the derivative of the first argument that none of the others beats."""
        *front, last = choices
        result = self.of(last)
        for index, candidate in reversed(list(enumerate(front))):
            test = sympy.And(*[beats(candidate, other) for other in choices[index + 1 :]])
            result = _where(test, self.of(candidate), result)
        return result


def _where(test: sympy.Basic, then: Expr, otherwise: Expr) -> Expr:
    """A choice as the parser makes it: unevaluated, since merging nested ones takes sympy unbounded time."""
    if then == otherwise:
        return then
    if test in (sympy.true, sympy.false):
        return then if test == sympy.true else otherwise
    return sympy.Piecewise((then, test), (otherwise, True), evaluate=False)


__all__ = ["ScoreDerivatives", "derivative", "score_derivatives"]
