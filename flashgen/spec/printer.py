"""sympy -> text of the expression language, which `parse_expression` reads back to the same mathematics."""

from __future__ import annotations

from typing import Any, NoReturn

import sympy
from sympy.core.function import AppliedUndef
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from flashgen.errors import SpecError
from flashgen.spec.values import MAX_EXPONENT, MAX_INTEGER

_EXACT_IN_FLOAT = 2**53


def to_text(expr: sympy.Basic) -> str:
    """Print an expression in the language it is written in.

    Raises:
        SpecError: it holds a function that the language does not have.
    """
    return str(_TextPrinter().doprint(expr))


def _is_large(number: sympy.Rational) -> bool:
    """Is a part of it beyond the integers of the language?"""
    return bool(number.is_Rational) and max(abs(number.p), number.q) > MAX_INTEGER


class _TextPrinter(StrPrinter):  # type: ignore[misc]
    def emptyPrinter(self, expr: Any) -> NoReturn:
        raise SpecError(f"'{type(expr).__name__}' cannot be written in the expression language")

    def _print_Function(self, expr: sympy.Function) -> NoReturn:
        self.emptyPrinter(expr)

    def _print_AppliedUndef(self, expr: AppliedUndef) -> str:
        """An element of a tensor, every subscript written; a tensor without axes stands alone."""
        subscripts = ", ".join(self._print(arg) for arg in expr.args)
        name = expr.func.__name__
        return f"{name}[{subscripts}]" if subscripts else name

    def _call(self, name: str, *args: sympy.Basic) -> str:
        return f"{name}({', '.join(self._print(arg) for arg in args)})"

    def _infix(self, symbol: str, args: tuple[sympy.Basic, ...], name: str) -> str:
        return f" {symbol} ".join(self.parenthesize(arg, PRECEDENCE[name]) for arg in args)

    def _as_ordered_terms(self, expr: sympy.Add, order: str | None = None) -> list[sympy.Expr]:
        """As sympy sorts them, but that a sum does not begin with a minus sign if it need not."""
        terms = list(super()._as_ordered_terms(expr, order=order))
        first = next((term for term in terms if term.as_coeff_Mul()[0].is_nonnegative), terms[0])
        return [first, *(term for term in terms if term is not first)]

    # -- conditions

    def _print_BooleanTrue(self, expr: sympy.Basic) -> str:
        return "true"

    def _print_BooleanFalse(self, expr: sympy.Basic) -> str:
        return "false"

    def _print_And(self, expr: sympy.And) -> str:
        return self._infix("and", tuple(sympy.ordered(expr.args)), "And")

    def _print_Or(self, expr: sympy.Or) -> str:
        return self._infix("or", tuple(sympy.ordered(expr.args)), "Or")

    def _print_Not(self, expr: sympy.Not) -> str:
        return f"not ({self._print(expr.args[0])})"

    def _print_ITE(self, expr: sympy.ITE) -> str:
        return self._call("where", *expr.args)

    def _print_Relational(self, expr: sympy.Rel) -> str:
        return self._infix(expr.rel_op, (expr.lhs, expr.rhs), "Relational")

    def _print_Mul(self, expr: sympy.Mul) -> str:
        coefficient, rest = expr.as_coeff_Mul()
        sums = rest.is_Mul and any(factor.is_Add for factor in rest.args)
        if coefficient == 1 or not (sums or _is_large(coefficient)):
            return str(super()._print_Mul(expr))
        # sympy multiplies 2*(a + b) out wherever it meets it, so the coefficient is kept from the sum
        product = f"({self._print(rest)})" if rest.is_Mul else self.parenthesize(rest, PRECEDENCE["Mul"])
        return f"-{product}" if coefficient == -1 else f"{self._print(coefficient)}*{product}"

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        base, exponent = expr.base, expr.exp
        if exponent.is_Rational and exponent.q > 2:
            if base.is_number:
                return repr(float(expr))
            if exponent.q & (exponent.q - 1):  # how sympy writes exp(log(x)/3)
                return f"exp({self._print(exponent)}*log({self._print(base)}))"
            return self._call("sqrt", sympy.Pow(base, 2 * exponent))
        if exponent.is_Rational and abs(exponent) > MAX_EXPONENT:
            inner = f"({self.parenthesize(base, PRECEDENCE['Pow'])}**{MAX_EXPONENT})"
            times, rest = divmod(abs(exponent), MAX_EXPONENT)
            text = self._print_Pow(sympy.Pow(sympy.Symbol(inner), times, evaluate=False))
            text = text if times > 1 else inner
            text = f"{text}*{self._print_Pow(sympy.Pow(base, rest, evaluate=False))}" if rest else text
            return f"1/({text})" if exponent < 0 else text
        return str(super()._print_Pow(expr, rational=rational))

    # -- numbers

    def _print_Integer(self, expr: sympy.Integer) -> str:
        return self._print_Rational(expr)

    def _print_Rational(self, expr: sympy.Rational) -> str:
        """Beyond the integers of the language a number is written as a float: exactly, up to 2^53."""
        if max(abs(expr.p), expr.q) > _EXACT_IN_FLOAT:
            return repr(float(expr))
        parts = (expr.p, expr.q)[: 1 if expr.q == 1 else 2]
        return "/".join(str(part) if abs(part) <= MAX_INTEGER else repr(float(part)) for part in parts)

    # -- integers

    def _print_floor(self, expr: sympy.floor) -> str:
        numerator, denominator = sympy.fraction(sympy.together(expr.args[0]))
        if not (numerator.is_integer and denominator.is_integer) or _is_large(denominator):
            return self._call("floor", *expr.args)
        # in brackets, since sympy takes a function to bind tighter than any operator
        return f"({self.parenthesize(numerator, PRECEDENCE['Mul'])} // {self._factor(denominator)})"

    def _print_modulo(self, expr: sympy.Function) -> str:
        a, b = expr.args
        return f"({self.parenthesize(a, PRECEDENCE['Mul'])} % {self._factor(b)})"

    def _print_Mod(self, expr: sympy.Mod) -> str:
        return self._print_modulo(expr)

    def _factor(self, expr: sympy.Expr) -> str:
        return str(self.parenthesize(expr, PRECEDENCE["Mul"], strict=False))

    # -- functions

    def _print_Max(self, expr: sympy.Max) -> str:
        return self._call("max", *sympy.ordered(expr.args))

    def _print_Min(self, expr: sympy.Min) -> str:
        return self._call("min", *sympy.ordered(expr.args))

    def _print_Abs(self, expr: sympy.Abs) -> str:
        return self._call("abs", *expr.args)

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        (*chosen, (otherwise, _)) = expr.args
        text = self._print(otherwise)
        for value, test in reversed(chosen):
            text = f"where({self._print(test)}, {self._print(value)}, {text})"
        return str(text)

    def _print_Exp1(self, expr: sympy.Expr) -> str:
        return "exp(1)"

    def _print_exp(self, expr: sympy.exp) -> str:
        return self._call("exp", *expr.args)

    def _print_log(self, expr: sympy.log) -> str:
        return self._call("log", *expr.args)

    def _print_tanh(self, expr: sympy.tanh) -> str:
        return self._call("tanh", *expr.args)

    def _print_sigmoid(self, expr: sympy.Function) -> str:
        return self._call("sigmoid", *expr.args)
