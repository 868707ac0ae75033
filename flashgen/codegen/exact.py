"""The exact half of the printer of masks and scores: integers and conditions, each part at its level.

A comparison with a key becomes one of the column with a limit of the row. A quotient or a remainder by a
constant is taken once for the row; the element's follows from the column, a constant once the loop is
unrolled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import reduce

import sympy
from sympy import Add, Expr, Integer, Mul, S
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from flashgen.codegen.extents import SATURATED, Extents
from flashgen.codegen.identifiers import identifier
from flashgen.codegen.levels import (
    COLUMN,
    FIRST_KV,
    PRODUCT,
    TANH,
    Kind,
    Levels,
    level_of,
)
from flashgen.codegen.printer import IntegerPrinter, bracketed
from flashgen.codegen.reads import Reads
from flashgen.spec.affine import is_whole
from flashgen.spec.functions import modulo
from flashgen.spec.inputs import RuntimeParameter
from flashgen.spec.printer import to_text
from flashgen.spec.symbols import BATCH, HEAD, HEAD_KV, KV, SCALE, SEQLEN_KV, SEQLEN_Q, Q

_LENGTHS = {SEQLEN_Q, SEQLEN_KV}


class LevelPrinter(IntegerPrinter):
    """Prints integers and conditions of one plan; what they need of outer levels gathers in `levels`."""

    def __init__(
        self,
        levels: Levels,
        reads: Reads,
        extents: Extents,
        parameters: tuple[RuntimeParameter, ...],
        group: int,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.extents = extents
        self.reads = reads
        self.divisors = {p.symbol for p in parameters if p.kind == "int" and p.least and p.least >= 1}
        self.row_leaves: dict[sympy.Symbol, str] = {}  # where they differ in a function of a row
        self.least_column = 0  # of those that what is printed is called with
        self.leaves: dict[sympy.Symbol, str] = {
            Q: "q",
            FIRST_KV: "kv",
            COLUMN: "c",
            PRODUCT: "s",
            TANH: "t",
            BATCH: "batch",
            HEAD: "head",
            HEAD_KV: f"head / {group}" if group > 1 else "head",
            SEQLEN_Q: "params.seqlen_q",
            SEQLEN_KV: "params.seqlen_kv",
            SCALE: "params.scale",
        } | {parameter.symbol: f"params.inputs.{identifier(parameter.name)}" for parameter in parameters}

    # -- levels

    def value(self, expr: sympy.Basic, kind: Kind, hint: str = "") -> str:
        """`expr` as an operand of what is printed at the present level; `hint` is a name for it."""
        if kind == "int" and self.extents.wide(expr):
            kind = "int64_t"
        level = level_of(expr)
        if level == "constant" or not self.levels.below(level) or (kind == "int" and expr in _LENGTHS):
            return self._here(expr, kind)
        if kind == "int" and expr.is_Add and all(arg in _LENGTHS or arg.is_Integer for arg in expr.args):
            return self._here(expr, kind)  # as cheap to compute as to keep
        with self.levels.inside(level):
            text = self._here(expr, kind)
        return self.levels.scopes[level].export(kind, text, hint or _hint(expr, kind), _about(expr))

    def _here(self, expr: sympy.Basic, kind: Kind) -> str:
        if expr.is_Atom or level_of(expr) == "constant":
            return self._text(expr, kind)
        place = (expr, kind, self.levels.at)
        self.levels.uses[expr, kind] += 1
        if place not in self.levels.printed:
            text = self._text(expr, kind)
            if (expr, kind) in self.levels.repeated:
                text = self.levels.scopes[self.levels.at].define(kind, text, _hint(expr, kind))
            self.levels.printed[place] = text
        return self.levels.printed[place]

    def _text(self, expr: sympy.Basic, kind: Kind) -> str:
        return self.real(expr) if kind == "float" else self.exact(expr)

    def exact(self, expr: sympy.Basic) -> str:
        """`expr` in integers, of 64 bits where it may leave 32, or as a truth value."""
        text = str(super()._print(expr))
        if self._has_wide_part(expr) and not self.extents.wide(expr):
            return f"static_cast<int>({text})"
        return text

    def _has_wide_part(self, expr: sympy.Basic) -> bool:
        """Whether an integer is printed from others that may leave 32 bits."""
        match expr:
            case sympy.floor():
                parts = sympy.fraction(sympy.together(expr.args[0]))
            case sympy.Piecewise():
                parts = [value for value, _ in expr.args]
            case sympy.Min() | sympy.Max() | modulo():
                parts = expr.args
            case _:
                return False
        return all(map(is_whole, parts)) and any(map(self.extents.wide, parts))

    def clamped(self, expr: Expr, kind: Kind, hint: str = "") -> str:
        """`value`, held to 31 bits where it may leave 32: for comparisons with what is smaller than that."""
        if not self.extents.wide(expr):
            return self.value(expr, kind, hint)
        if expr.is_Integer:
            return str(SATURATED if expr > 0 else -SATURATED)
        level = self.levels.outermost(level_of(expr))
        with self.levels.inside(level):
            text = f"saturated({self._print(expr)})"
        below = self.levels.below(level)
        return self.levels.scopes[level].export("int", text, hint or "n", _about(expr)) if below else text

    def _in_64_bits(self, expr: Expr) -> str:
        if expr.is_Integer:
            return f"int64_t{{{int(expr)}}}"
        text = self._print(expr)
        return text if self.extents.wide(expr) else f"static_cast<int64_t>({text})"

    def _alike(self, *exprs: Expr) -> list[str]:
        """The operands of a function that takes integers of one type."""
        wide = any(map(self.extents.wide, exprs))
        return [self._in_64_bits(expr) if wide else self._print(expr) for expr in exprs]

    def real(self, expr: Expr) -> str:
        """`expr` in fp32."""
        return self.emptyPrinter(expr)

    def _print(self, expr: sympy.Basic, **settings: object) -> str:
        boolean = isinstance(expr, sympy.logic.boolalg.Boolean) and not isinstance(expr, sympy.Symbol)
        return self.value(expr, "bool" if boolean else "int")

    def element(self, expr: sympy.Basic) -> bool:
        return level_of(expr) == "element"

    def outer(self, args: tuple[Expr, ...]) -> tuple[list[Expr], list[Expr]]:
        """`args` in those of outer levels and those of the present one."""
        outer = [arg for arg in args if self.levels.below(level_of(arg))]
        return outer, [arg for arg in args if not self.levels.below(level_of(arg))]

    def affine(self, expr: Expr) -> tuple[Expr, Expr] | None:
        """(a, b) with ``expr == a + b*c``, both free of the element; None where there are none."""
        if not self.element(expr):
            return expr, S.Zero
        if expr == COLUMN:
            return S.Zero, S.One
        if expr.is_Add:
            parts = [self.affine(arg) for arg in expr.args]
            if None in parts:
                return None
            return Add(*[part[0] for part in parts if part]), Add(*[part[1] for part in parts if part])
        if expr.is_Mul:
            inner = [arg for arg in expr.args if self.element(arg)]
            rest = Mul(*[arg for arg in expr.args if not self.element(arg)])
            if len(inner) == 1 and (part := self.affine(inner[0])):
                return rest * part[0], rest * part[1]
        return None

    def split(self, expr: Add) -> tuple[Expr, Expr, list[Expr]]:
        """(a, b, others) with ``expr == a + b*c + sum(others)``."""
        a, b, others = S.Zero, S.Zero, []
        for arg in expr.args:
            if part := self.affine(arg):
                a, b = a + part[0], b + part[1]
            else:
                others.append(arg)
        return a, b, others

    # -- integers and booleans

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        if self.levels.at in ("query", "row") and expr in self.row_leaves:
            return self.row_leaves[expr]
        if expr in self.leaves:
            return self.leaves[expr]
        return expr.name[:-1] if expr.name.endswith("'") else identifier(expr.name)

    def _print_Add(self, expr: Add) -> str:
        if not self.element(expr):
            return self._added(expr, [_signed(term) for term in expr.as_ordered_terms()])
        a, b, others = self.split(expr)
        terms = [_signed(term) for term in others]
        if b != 0:
            terms.append(_signed(b * COLUMN))
        if a != 0:
            terms.append(("+", a))
        return self._added(expr, terms, first=len(terms) - 1 if a != 0 else 0)

    def _added(self, expr: Expr, terms: list[tuple[str, Expr]], first: int = 0) -> str:
        """The sum of `terms`, which is `expr`; of those that are added, number `first` stands in front."""
        wide = self.extents.wide(expr) or any(self.extents.wide(term) for _, term in terms)
        order = sorted(range(len(terms)), key=lambda at: (terms[at][0] == "-", at != first, at))
        texts = [
            self._in_64_bits(term) if wide and at == order[0] else self.value(term, "int")
            for at, (_, term) in enumerate(terms)
        ]
        text = _sum([(terms[at][0], texts[at]) for at in order])
        return text if self.extents.wide(expr) or not wide else f"static_cast<int>({text})"

    def signed(self, term: Expr, kind: Kind) -> tuple[str, str]:
        sign, magnitude = _signed(term)
        return sign, self.value(magnitude, kind)

    def _print_Mul(self, expr: Mul) -> str:
        if not all(is_whole(arg) for arg in expr.args):
            self.emptyPrinter(expr)
        outer, inner = self.outer(expr.args)
        coefficient = Mul(*outer)
        wide = self.extents.wide(expr)
        alone = coefficient in (1, -1)
        factors = [self._factor(factor, wide=wide and alone and factor == inner[0]) for factor in inner]
        if not alone:
            factors.insert(0, self._factor(coefficient, wide=wide))
        return ("-" if coefficient == -1 else "") + " * ".join(factors)

    def _factor(self, factor: Expr, *, wide: bool) -> str:
        return bracketed(self._in_64_bits(factor) if wide else self.value(factor, "int"))

    def _print_Pow(self, expr: sympy.Pow) -> str:
        if not self.extents.wide(expr):
            return super()._print_Pow(expr)
        factor = self._factor(expr.base, wide=False)
        return " * ".join([self._factor(expr.base, wide=True), *[factor] * (int(expr.exp) - 1)])

    def _print_Abs(self, expr: sympy.Abs) -> str:
        (operand,) = expr.args
        return f"abs({self._in_64_bits(operand) if self.extents.wide(expr) else self._print(operand)})"

    def _floor_div(self, quotient: Expr) -> str:
        numerator, denominator = sympy.fraction(sympy.together(quotient))
        if not (is_whole(numerator) and is_whole(denominator)):
            return f"__float2int_rd({self.value(quotient, 'float')})"
        if (part := self._phase(numerator, denominator)) is not None:
            whole, phase, slope = part
            if slope < 0:  # floor((phase - x) / n) = -floor((n - 1 - phase + x) / n)
                phase = denominator - 1 - phase
            total = _sum([("+", self._print(phase)), ("+", self._columns(abs(slope)))])
            tail = f"static_cast<int>(static_cast<unsigned>({total}) / {int(denominator)})"
            start = [] if whole == 0 else [("+", self._print(whole))]
            return _sum([*start, ("-" if slope < 0 else "+", tail)])
        if _power_of_two(denominator):
            return f"{bracketed(self._print(numerator))} >> {int(denominator).bit_length() - 1}"
        return f"floor_div({', '.join(self._alike(numerator, denominator))})"

    def _phase(self, numerator: Expr, divisor: Expr) -> tuple[Expr, Expr, int] | None:
        """Of ``a + b*c`` over a constant: (a // divisor, a % divisor, b).

        There a is what the sum is at the least column, from which `_columns` counts.
        """
        if not (self.element(numerator) and divisor.is_Integer and divisor > 0) or _power_of_two(divisor):
            return None
        part = self.affine(numerator)
        if part is None or not part[1].is_Integer:
            return None
        if self.extents.wide((divisor + abs(part[1])) * COLUMN):
            return None
        start = part[0] + self.least_column * part[1]
        return sympy.floor(start / divisor), modulo(start, divisor), int(part[1])

    def _columns(self, factor: int) -> str:
        """`factor` times the columns from the least on: never negative, as C's ``/`` and ``%`` need."""
        count = f"c + {-self.least_column}" if self.least_column else "c"
        return count if factor == 1 else f"{factor} * {bracketed(count)}"

    def _print_modulo(self, expr: Expr) -> str:
        dividend, divisor = expr.args
        if _power_of_two(divisor):
            return f"{bracketed(self._print(dividend))} & {int(divisor) - 1}"
        if (part := self._phase(dividend, divisor)) is not None:
            _, phase, slope = part
            total = _sum([("+", self._print(phase)), ("+", self._columns(slope % int(divisor)))])
            return f"static_cast<int>(static_cast<unsigned>({total}) % {int(divisor)})"
        return f"floor_mod({', '.join(self._alike(dividend, divisor))})"

    def _nested(self, function: str, args: Iterable[Expr]) -> str:
        ordered = sorted(args, key=lambda arg: (arg.is_Number, sympy.default_sort_key(arg)))
        return reduce(lambda left, right: f"{function}({left}, {right})", self._alike(*ordered))

    def _print_Min(self, expr: sympy.Min) -> str:
        return self._nested("min", self.grouped(expr))

    def _print_Max(self, expr: sympy.Max) -> str:
        return self._nested("max", self.grouped(expr))

    def grouped(self, expr: Expr) -> list[Expr]:
        outer, inner = self.outer(expr.args)
        return [expr.func(*outer), *inner] if outer else inner

    def _print_AppliedUndef(self, expr: AppliedUndef) -> str:
        return self.reads.element(self, expr)

    def _print_Relational(self, expr: Relational) -> str:
        left, right = expr.lhs, expr.rhs
        difference = sympy.expand(left - right)
        terms = Add.make_args(difference)
        scale = sympy.ilcm(1, *[term.as_coeff_Mul()[0].q for term in terms if _rational(term)])
        terms = [scale * term for term in terms]
        if not all(is_whole(term) for term in terms):
            return f"{self.value(left, 'float')} {expr.rel_op} {self.value(right, 'float')}"
        if self.levels.at != "element":
            if not (is_whole(left) and is_whole(right)):
                left, right = Add(*terms), S.Zero
            return f"{_side(self._print(left))} {expr.rel_op} {_side(self._print(right))}"
        if isinstance(expr, sympy.Eq | sympy.Ne) and (text := self._print_congruence(expr)):
            return text
        return self._print_difference(Add(*terms), expr.rel_op)

    def _print_difference(self, difference: Expr, operator: str) -> str:
        """``difference <operator> 0``, as a comparison of the element's part with the row's."""
        a, b, others = self.split(difference) if difference.is_Add else (S.Zero, S.Zero, [difference])
        if not others and b.is_number and b < 0:
            a, b, operator = -a, -b, _MIRRORED[operator]
        if len(others) == 1 and b == 0 and others[0].as_coeff_Mul()[0] < 0:
            a, others, operator = -a, [-others[0]], _MIRRORED[operator]
        inner = [*others, *([b * COLUMN] if b != 0 else [])]
        hint = {"<": "end", "<=": "last", ">": "before", ">=": "first"}.get(operator, "")
        left = self._added(Add(*inner), [_signed(term) for term in inner])
        least, greatest = self.extents.of(Add(*inner))
        limited = max(-least, greatest) < SATURATED
        right = self.clamped(-a, "int", hint) if limited else self.value(-a, "int", hint)
        return f"{_side(left)} {operator} {right}"

    def _print_congruence(self, expr: Relational) -> str | None:
        """``x % n == y`` with n constant and y per row, as ``u == c % n`` with u per row."""
        for remainder, other in ((expr.lhs, expr.rhs), (expr.rhs, expr.lhs)):
            if not (isinstance(remainder, modulo | sympy.Mod) and not self.element(other)):
                continue
            dividend, divisor = remainder.args
            part = self.affine(dividend)
            if part is None or not part[1].is_Integer or not self.element(dividend):
                continue
            if divisor in self.divisors and other == 0 and abs(part[1]) == 1:
                holds = self._print_divisible(part[0] * -part[1], divisor)
                return holds if isinstance(expr, sympy.Eq) else f"!{holds}"
            if not (divisor.is_Integer and divisor > 0) or self.extents.wide(divisor * COLUMN):
                continue
            n = int(divisor)
            # a + b c = other (mod n), where other is in [0, n): b c = other - a
            phase = modulo(other - part[0] - self.least_column * part[1], divisor)
            if not (other.is_Integer and 0 <= other < n):
                inside = sympy.And(sympy.Ge(other, 0), sympy.Lt(other, n))
                phase = sympy.Piecewise((phase, inside), (Integer(-1), True))
            columns = as_term(self._columns(int(part[1]) % n))
            return f"{columns} % {n} {expr.rel_op} {self._print(phase)}"
        return None

    def _print_divisible(self, target: Expr, divisor: Expr) -> str:
        """Whether ``c - target`` is a multiple of a divisor that is known at run time."""
        multiples = self.value(divisor, "int")
        with self.levels.inside("head"):
            text = f"multiples_of({multiples})"
        multiples = self.levels.scopes["head"].export("Multiples", text, "multiples")
        with self.levels.inside("row"):
            text = f"{multiples}.from({self._print(modulo(target - self.least_column, divisor))})"
        start = self.levels.scopes["row"].export("unsigned", text, "start")
        return f"{multiples}.hold({start}, {self._columns(1)})"

    def _print_And(self, expr: sympy.And) -> str:
        return self._combined(expr, "&" if self.levels.at == "element" else "&&")

    def _print_Or(self, expr: sympy.Or) -> str:
        return self._combined(expr, "|" if self.levels.at == "element" else "||")

    def _combined(self, expr: sympy.And | sympy.Or, operator: str) -> str:
        # Of an element without branches: both sides are cheap, and a branch keeps loads from being shared.
        outer, inner = self.outer(expr.args)
        if self.levels.at == "element":
            inner = self._limits(inner, conjunction=isinstance(expr, sympy.And))
        parts = sorted(inner, key=sympy.default_sort_key)
        texts = [bracketed(self._print(part)) for part in parts]
        if outer:
            texts.append(bracketed(self._print(expr.func(*outer))))
        return f" {operator} ".join(texts)

    def _limits(self, parts: list[sympy.Basic], *, conjunction: bool) -> list[sympy.Basic]:
        """Comparisons of the column with a row's limit, merged where one implies the other."""
        above: list[Expr] = []  # c <= limit
        below: list[Expr] = []  # c >= limit
        others: list[sympy.Basic] = []
        for part in parts:
            limits = self._limit(part)
            if limits is None:
                others.append(part)
            else:
                (above if limits[0] == "<=" else below).append(limits[1])
        nearest, farthest = (sympy.Min, sympy.Max) if conjunction else (sympy.Max, sympy.Min)
        if above:
            others.append(sympy.Le(COLUMN, nearest(*above), evaluate=False))
        if below:
            others.append(sympy.Ge(COLUMN, farthest(*below), evaluate=False))
        return others

    def _limit(self, part: sympy.Basic) -> tuple[str, Expr] | None:
        if not isinstance(part, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
            return None
        difference = part.lhs - part.rhs
        affine = self.affine(difference)
        if affine is None or abs(affine[1]) != 1 or not is_whole(affine[0]):
            return None
        a, b = affine
        strict = isinstance(part, sympy.Lt | sympy.Gt)
        less = isinstance(part, sympy.Le | sympy.Lt)
        if less == (b == 1):  # c <= limit
            return "<=", (-a if b == 1 else a) - (1 if strict else 0)
        return ">=", (-a if b == 1 else a) + (1 if strict else 0)


def _signed(term: Expr) -> tuple[str, Expr]:
    """The sign that `term` has in a sum, and what it stands before."""
    return ("-", -term) if term.as_coeff_Mul()[0] < 0 else ("+", term)


def _side(text: str) -> str:
    """`text` as a side of a comparison, which binds more than ``&`` does."""
    return bracketed(text) if re.search(" [&|] ", text) else text


_MIRRORED: Mapping[str, str] = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "==": "==", "!=": "!="}


def _power_of_two(divisor: Expr) -> bool:
    return bool(divisor.is_Integer and divisor > 0 and int(divisor) & (int(divisor) - 1) == 0)


def _rational(term: Expr) -> bool:
    return bool(term.as_coeff_Mul()[0].is_Rational)


def as_term(text: str) -> str:
    """`text` as a term of a sum: products as they are, anything of lower precedence in brackets."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character == " " and not text.startswith("* ", at + 1) and text[at - 1] != "*":
            return f"({text})"
    return f"({text})" if text.startswith("-") else text


def _sum(terms: list[tuple[str, str]]) -> str:
    ordered = sorted(terms, key=lambda term: term[0] == "-")
    text = ""
    for sign, magnitude in ordered:
        term = as_term(magnitude) if len(ordered) > 1 or sign == "-" else magnitude
        text += f" {sign} {term}" if text else ("-" if sign == "-" else "") + term
    return text or "0"


def _hint(expr: sympy.Basic, kind: Kind) -> str:
    if isinstance(expr, AppliedUndef):
        return str(expr.func)
    if isinstance(expr, sympy.Symbol):
        return str(expr.name.rstrip("'"))
    return {"int": "n", "int64_t": "n", "float": "x", "bool": "holds"}[kind]


def _about(expr: sympy.Basic) -> str:
    return "" if expr.is_Atom else to_text(expr.xreplace({FIRST_KV: KV}))


__all__ = ["LevelPrinter", "as_term"]
