"""sympy integer and boolean expressions -> CUDA C++, exact on ``int``.

Python's arithmetic differs from C's where operands are negative: ``//`` and ``%`` floor in Python and
truncate in C. They are printed as `floor_div` and `floor_mod` of ``templates/device/integer.cuh``. What has
no exact integer form (a fraction, a float, an unknown function) is refused: nothing becomes a double.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import sympy
from sympy.printing.printer import Printer


def cuda(expression: sympy.Basic | int) -> str:
    """Print an integer or boolean expression in CUDA C++, over ``int`` variables of the same names.

    Raises `ValueError` where the expression has no exact integer form.
    """
    return str(IntegerPrinter().doprint(sympy.sympify(expression, strict=True)))


def bracketed(text: str) -> str:
    """`text` as an operand: in brackets if an operator stands outside of all brackets in it."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character == " ":
            return f"({text})"
    return f"({text})" if text.startswith(("-", "!")) else text


class IntegerPrinter(Printer):  # type: ignore[misc]  # sympy is untyped
    """Prints what has a method below; everything else ends in `emptyPrinter`, which refuses."""

    printmethod = "_cuda_code"

    def emptyPrinter(self, expr: Any) -> str:
        raise ValueError(f"{type(expr).__name__} has no exact integer form in CUDA: {expr!s}")

    def _operand(self, expr: sympy.Basic) -> str:
        return bracketed(self._print(expr))

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        if not (expr.name.isidentifier() and expr.name.isascii()):
            raise ValueError(f"{expr.name!r} is no C++ identifier")
        return str(expr.name)

    def _print_Integer(self, expr: sympy.Integer) -> str:
        return str(int(expr))

    def _print_Add(self, expr: sympy.Add) -> str:
        text = ""
        for term in expr.as_ordered_terms():
            coefficient, _ = term.as_coeff_Mul()
            sign = "-" if coefficient < 0 else "+"
            magnitude = self._print(-term if coefficient < 0 else term)
            text += f" {sign} {magnitude}" if text else ("-" if sign == "-" else "") + magnitude
        return text

    def _print_Mul(self, expr: sympy.Mul) -> str:
        coefficient, rest = expr.as_coeff_Mul()
        if not coefficient.is_Integer:
            self.emptyPrinter(expr)
        factors = [self._operand(factor) for factor in sympy.Mul.make_args(rest)]
        if abs(coefficient) != 1:
            factors.insert(0, str(abs(int(coefficient))))
        return ("-" if coefficient < 0 else "") + " * ".join(factors)

    def _print_Pow(self, expr: sympy.Pow) -> str:
        if not (expr.exp.is_Integer and expr.exp > 0):
            self.emptyPrinter(expr)
        return " * ".join([self._operand(expr.base)] * int(expr.exp))

    def _print_floor(self, expr: sympy.floor) -> str:
        return self._floor_div(expr.args[0])

    def _print_ceiling(self, expr: sympy.ceiling) -> str:
        return f"-{bracketed(self._floor_div(-expr.args[0]))}"

    def _floor_div(self, quotient: sympy.Expr) -> str:
        numerator, denominator = sympy.fraction(sympy.together(quotient))
        return f"floor_div({self._print(numerator)}, {self._print(denominator)})"

    def _print_Mod(self, expr: sympy.Mod) -> str:
        return self._print_modulo(expr)

    def _print_modulo(self, expr: sympy.Expr) -> str:
        return f"floor_mod({self._print(expr.args[0])}, {self._print(expr.args[1])})"

    def _print_Abs(self, expr: sympy.Abs) -> str:
        return f"abs({self._print(expr.args[0])})"

    def _print_Min(self, expr: sympy.Min) -> str:
        return self._nested("min", expr.args)

    def _print_Max(self, expr: sympy.Max) -> str:
        return self._nested("max", expr.args)

    def _nested(self, function: str, args: Iterable[sympy.Expr]) -> str:
        # Constants last: `max(q - 4095, 0)`.
        ordered = sorted(args, key=lambda arg: (arg.is_Number, sympy.default_sort_key(arg)))
        return str(reduce(lambda left, right: f"{function}({left}, {right})", map(self._print, ordered)))

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        *cases, (otherwise, always) = expr.args
        if always != sympy.true:
            raise ValueError(f"Piecewise without a default has no value everywhere: {expr!s}")
        text = self._print(otherwise)
        for value, condition in reversed(cases):
            text = f"({self._operand(condition)} ? {self._print(value)} : {text})"
        return str(text)

    def _print_Relational(self, expr: sympy.core.relational.Relational) -> str:
        return f"{self._print(expr.lhs)} {expr.rel_op} {self._print(expr.rhs)}"

    def _print_BooleanTrue(self, expr: sympy.Basic) -> str:
        return "true"

    def _print_BooleanFalse(self, expr: sympy.Basic) -> str:
        return "false"

    def _print_Not(self, expr: sympy.Not) -> str:
        return f"!{self._operand(expr.args[0])}"

    def _print_And(self, expr: sympy.And) -> str:
        return self._joined(" && ", expr)

    def _print_Or(self, expr: sympy.Or) -> str:
        return self._joined(" || ", expr)

    def _print_ITE(self, expr: sympy.ITE) -> str:
        test, chosen, otherwise = (self._operand(arg) for arg in expr.args)
        return f"({test} ? {chosen} : {otherwise})"

    def _joined(self, operator: str, expr: sympy.Basic) -> str:
        return operator.join(self._operand(arg) for arg in sorted(expr.args, key=sympy.default_sort_key))


__all__ = ["IntegerPrinter", "bracketed", "cuda"]
