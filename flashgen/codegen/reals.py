"""The real half of the printer of masks and scores: fp32, on the hardware's fast instructions.

Work is moved outwards where it can be: a sum is split into what is known per row and what belongs to the
element, so that ``slope*(kv - q)`` is one multiply-add of the column; no integer is converted for an element
where a row's can be.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import sympy
from sympy import Add, Expr, Mul, Pow, Rational, S
from sympy.core.function import AppliedUndef

from flashgen.codegen.exact import LevelPrinter, as_term
from flashgen.codegen.levels import COLUMN, level_of
from flashgen.codegen.printer import bracketed
from flashgen.spec.affine import is_whole
from flashgen.spec.functions import sigmoid

_LOG2E = 1 / sympy.log(2)
_MOST_FACTORS = 8  # of a product that is written out


class ElementPrinter(LevelPrinter):
    """Prints masks and scores."""

    def real(self, expr: Expr) -> str:
        if level_of(expr) == "constant":
            return literal(expr)
        if isinstance(expr, AppliedUndef):
            text = self.reads.element(self, expr)
            return f"static_cast<float>({text})" if is_whole(expr) else text
        if is_whole(expr) and not (_structural(expr) and (self.levels.at == "element" or _wide(expr))):
            return f"static_cast<float>({self.exact(expr)})"
        if expr.is_Symbol:
            return self._print_Symbol(expr)
        if expr.is_Add:
            return self._real_sum(expr)
        if expr.is_Mul:
            return self._real_product(expr)
        if expr.is_Pow:
            return self._real_power(expr)
        if isinstance(expr, sympy.Piecewise):
            return self._real_choice(expr)
        if isinstance(expr, sympy.Min | sympy.Max):
            name = "fminf" if isinstance(expr, sympy.Min) else "fmaxf"
            texts = [self.value(arg, "float") for arg in self.grouped(expr)]
            return reduce(lambda left, right: f"{name}({left}, {right})", texts)
        if isinstance(expr, sympy.Abs):
            return f"fabsf({self.value(expr.args[0], 'float')})"
        if isinstance(expr, sympy.exp):
            return f"exp2_approx({self.value(_LOG2E * expr.args[0], 'float')})"
        if isinstance(expr, sigmoid):
            return f"reciprocal_approx(1.0f + exp2_approx({self.value(-_LOG2E * expr.args[0], 'float')}))"
        if isinstance(expr, sympy.log):
            return self._real_product(expr)
        if isinstance(expr, sympy.tanh):
            return f"tanh_approx({self.value(expr.args[0], 'float')})"
        raise ValueError(f"{type(expr).__name__} cannot be printed in CUDA: {expr!s}")

    def _real_sum(self, expr: Add) -> str:
        if self.levels.at == "element":
            a, b, others = self.split(expr)
        else:
            outer, others = self.outer(expr.args)
            a, b = Add(*outer), S.Zero
        # From the right, so that every product is one multiply-add: x * y + (z * c + row.a)
        text = None if a == 0 else self.value(a, "float")
        for term in ([b * COLUMN] if b != 0 else []) + others:
            sign, magnitude = self.signed(term, "float")
            magnitude = as_term(magnitude)
            if text is None:
                text = magnitude if sign == "+" else f"-{bracketed(magnitude)}"
            elif sign == "+":
                text = f"{magnitude} + {as_term(text)}"
            else:
                text = f"{as_term(text)} - {magnitude}"
        assert text is not None
        return text

    def _real_product(self, expr: Expr) -> str:
        outer, inner = self.outer(Mul.make_args(expr))
        logarithms = [factor for factor in inner if isinstance(factor, sympy.log)]
        coefficient = Mul(*outer, *[sympy.log(2)] * len(logarithms))
        if self.levels.at == "element":
            if (part := self.affine(expr)) and part[0] != 0:
                return self._real_sum(Add(part[0], part[1] * COLUMN, evaluate=False))
            if len(inner) == 1 and inner[0].is_Add and coefficient not in (1, -1):
                return self._real_sum(Add(*[coefficient * term for term in inner[0].args]))
        factors = []
        for factor in inner:
            if factor in logarithms:
                factors.append(f"log2_approx({self.value(factor.args[0], 'float')})")
            else:
                factors.append(bracketed(self.value(factor, "float")))
        if coefficient == -1 or (not factors and coefficient.is_number):
            return "-" + " * ".join(factors) if factors else literal(coefficient)
        if coefficient.is_number and abs(float(coefficient) - 1) < 1e-12:
            return " * ".join(factors)
        return " * ".join([*factors, bracketed(self.value(coefficient, "float"))])

    def _real_power(self, expr: Pow) -> str:
        base, exponent = expr.args
        if exponent.is_Integer:  # never by a logarithm, which a negative base has not
            operand = bracketed(self.value(base, "float"))
            if exponent > 1 and not operand.replace(".", "").isidentifier():
                operand = self.levels.scopes[self.levels.at].define("float", operand, "x")
            power = self._product_of(operand, abs(int(exponent)))
            return power if exponent > 0 else f"reciprocal_approx({power})"
        if exponent == Rational(1, 2):
            return f"sqrt_approx({self.value(base, 'float')})"
        if exponent == Rational(-1, 2):
            return f"rsqrt_approx({self.value(base, 'float')})"
        if base.is_number:
            return f"exp2_approx({self.value(exponent * sympy.log(base) * _LOG2E, 'float')})"
        logarithm = f"log2_approx({self.value(base, 'float')})"
        return f"exp2_approx({bracketed(self.value(exponent, 'float'))} * {logarithm})"

    def _product_of(self, factor: str, count: int) -> str:
        """A power as a product; of many factors as the square of half of them."""
        if count <= _MOST_FACTORS:
            return " * ".join([factor] * count)
        root = self.levels.scopes[self.levels.at].define("float", self._product_of(factor, count // 2), "x")
        return f"{root} * {root}" + (f" * {factor}" if count % 2 else "")

    def _real_choice(self, expr: sympy.Piecewise) -> str:
        *cases, (otherwise, always) = expr.args
        if always != sympy.true:
            raise ValueError(f"Piecewise without a default has no value everywhere: {expr!s}")
        text = self.value(otherwise, "float")
        for chosen, condition in reversed(cases):
            text = f"({bracketed(self._print(condition))} ? {self.value(chosen, 'float')} : {text})"
        return text


def literal(expr: Expr) -> str:
    """A real constant as the nearest fp32."""
    number = np.float32(float(expr))
    if not np.isfinite(number):
        return "negative_infinity()" if number < 0 else "-negative_infinity()"
    plain = number == 0 or 1e-4 <= abs(number) < 1e7
    digits = np.format_float_positional if plain else np.format_float_scientific
    return f"{digits(number, trim='0')}f"


def _wide(expr: Expr) -> bool:
    """Whether a product of positions or lengths may pass 32 bits."""
    return any(
        part.is_Pow or (part.is_Mul and sum(not factor.is_Integer for factor in part.args) > 1)
        for part in Add.make_args(expr)
    )


def _structural(expr: Expr) -> bool:
    """Whether an integer expression can be computed in fp32 from the fp32 of its parts."""
    return bool(
        expr.is_Symbol
        or expr.is_Add
        or expr.is_Mul
        or expr.is_Pow
        or isinstance(expr, sympy.Min | sympy.Max | sympy.Abs)
    ) or isinstance(expr, sympy.Piecewise)


__all__ = ["ElementPrinter", "literal"]
