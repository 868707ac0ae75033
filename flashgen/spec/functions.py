"""Functions of the expression language that sympy lacks, or has with flaws."""

from __future__ import annotations

import sympy
from sympy import Expr, S
from sympy.core.function import AppliedUndef


class modulo(sympy.Function):  # type: ignore[misc]
    """``a % b`` with the sign of b, as in Python.

    Not `sympy.Mod`, which rewrites products wrongly, up to 1.14 at least: Mod(2*Mod(x, 3), 3) becomes
    2*Mod(x, 3), which is 4 at x = 2.
    """

    nargs = 2

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if a.is_Rational and b.is_Rational and b != 0:
            return a - b * sympy.floor(a / b)
        return S.Zero if a.is_integer and b in (S.One, S.NegativeOne) else None

    def _eval_is_integer(self) -> bool | None:
        return True if all(arg.is_integer for arg in self.args) else None

    def _eval_evalf(self, prec: int) -> Expr:
        a, b = self.args
        return (a - b * sympy.floor(a / b))._eval_evalf(prec)


def floor_quotient(a: Expr, b: Expr) -> Expr:
    """``a // b`` of integers, kept a quotient of integers under the floor.

    sympy makes 1/where(c, 2, 3) a choice of 1/2 and 1/3, which no floor divides exactly: the choice is taken
    between the quotients instead.
    """
    factors = sympy.Mul.make_args(b)
    choice = next((factor for factor in factors if isinstance(factor, sympy.Piecewise)), None)
    if choice is None:
        return sympy.floor(a / b)
    rest = sympy.Mul(*[factor for factor in factors if factor is not choice])
    cases = [(floor_quotient(a, value * rest), test) for value, test in choice.args]
    return sympy.Piecewise(*cases, evaluate=False)


class sigmoid(sympy.Function):  # type: ignore[misc]
    """1 / (1 + exp(-x)), kept whole so that it prints as one instruction sequence and not as a quotient."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> Expr:
        return self * (1 - self)

    def _eval_evalf(self, prec: int) -> Expr:
        return (1 / (1 + sympy.exp(-self.args[0])))._eval_evalf(prec)


COSTLY = (
    AppliedUndef, sympy.tanh, sympy.exp, sympy.log, sigmoid, sympy.Pow, sympy.floor, sympy.Mod, modulo,
)  # fmt: skip
"""What takes more than an instruction or two, or waits for memory: worth a register where it can be kept."""
