"""One node of an expression's tree -> a typed value: constants, operators, functions.

What names, subscripts and entries of the gallery stand for is said by the subclass in
`flashgen.spec.expression`.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NoReturn

import sympy
from sympy import S

from flashgen.spec.affine import is_integral, is_whole
from flashgen.spec.functions import modulo
from flashgen.spec.inputs import TensorInput
from flashgen.spec.suggest import did_you_mean
from flashgen.spec.syntax import MAX_DEPTH
from flashgen.spec.values import (
    COMPARISONS,
    FUNCTIONS,
    MAX_EXPONENT,
    MAX_INTEGER,
    MAX_REAL,
    MIN_REAL,
    NUMERIC_FUNCTIONS,
    OPERATORS,
    Kind,
    Unfit,
    Value,
    computed,
    has_large_integer,
    misfit,
)

# Arguments of min, max, abs and where: in one comparison or score, where their combinations multiply, and in
# all; and how deep min, max and abs stand in each other, each level of which triples sympy's time.
MAX_CHOICES = 16
MAX_CHOICES_IN_ALL = 48
MAX_NESTED_CHOICES = 5


@dataclass(frozen=True)
class NamedEntries:
    """A text that is one entry of the gallery, or several joined by one operator; with their arguments."""

    calls: tuple[tuple[str, tuple[sympy.Expr, ...]], ...]
    operator: Literal["and", "or"] = "and"


@dataclass
class Reading:
    """What was read: the mathematics, and what it takes.

    `tensors` are those that entries of the gallery brought along, `integers` the symbols that stood where
    only an integer may, `sink` whether an entry asks for one, `named` the entries where the text is nothing
    else, `mentioned` the parameters and tensors that stand in it, though they may cancel. The counts are held
    to the language's limits; `choices` starts anew in each comparison that is part of no other (`enclosed`).
    """

    expr: sympy.Basic = S.Zero
    tensors: dict[str, TensorInput] = field(default_factory=dict)
    integers: set[sympy.Symbol] = field(default_factory=set)
    sink: bool = False
    named: NamedEntries | None = None
    mentioned: set[str] = field(default_factory=set)
    nodes: int = 0
    comparisons: int = 0
    choices: int = 0
    choices_in_all: int = 0
    nested: int = 0
    enclosed: int = 0


_INSTEAD: Mapping[type[ast.AST], str] = {
    ast.BitAnd: "write 'and'",
    ast.BitOr: "write 'or'",
    ast.Invert: "write 'not'",
    ast.BitXor: "write '**' for a power",
    ast.IfExp: "write where(condition, a, b)",
}


def _fractions(*exprs: sympy.Basic) -> list[tuple[list[sympy.Basic], sympy.Basic]]:
    """The expressions under each condition of a choice of fractions, which sympy makes of 1/where(c, 2, 3).

    Empty where there is none. Quotients of integers compare, and are floored, exactly outside of a choice.
    """
    if not all(map(is_integral, exprs)):
        return []
    for choice in sympy.ordered(choice for expr in exprs for choice in expr.atoms(sympy.Piecewise)):
        if not is_whole(choice):
            return [([expr.xreplace({choice: value}) for expr in exprs], test) for value, test in choice.args]
    return []


def _compared(compare: Callable[..., sympy.Basic], a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """The comparison, taken within choices of fractions.

    Of floors of choices it is no equality: sympy would take exponential time to see whether it holds.
    """
    floors = (floor for side in (a, b) for floor in side.atoms(sympy.floor, modulo))
    if compare in (sympy.Eq, sympy.Ne) and any(
        floor.has(sympy.Max, sympy.Min, sympy.Abs) for floor in floors
    ):
        same = sympy.And(sympy.Le(a, b), sympy.Ge(a, b))
        return same if compare is sympy.Eq else sympy.Not(same)
    if not (cases := _fractions(a, b)):
        return compare(a, b)
    result: sympy.Basic = sympy.false
    for sides, test in reversed(cases):
        result = sympy.Or(sympy.And(test, _compared(compare, *sides)), sympy.And(sympy.Not(test), result))
    return result


def _floored(x: sympy.Expr) -> sympy.Expr:
    """The floor, taken within choices of fractions."""
    if cases := _fractions(x):
        return sympy.Piecewise(*((_floored(part), test) for (part,), test in cases), evaluate=False)
    return sympy.floor(x)


class Operations(ABC):
    """Reads a tree, and adds what it takes to `reading`."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    @abstractmethod
    def fail_at(self, node: ast.expr, message: str, hint: str | None = None) -> NoReturn:
        """Raises SpecError at a node's place."""

    @abstractmethod
    def name(self, node: ast.expr, name: str) -> Value:
        """What a name stands for."""

    @abstractmethod
    def subscript(self, node: ast.expr, name: str, subscript: ast.expr, depth: int) -> Value:
        """An element of a tensor: ``bias[head, q, kv]``."""

    @abstractmethod
    def entry(self, node: ast.expr, name: str, arguments: Sequence[ast.expr], depth: int) -> Value:
        """A call of something that is no function of the language: ``window(4096)``."""

    # -- one node ------------------------------------------------------------------------------------------

    def visit(self, node: ast.expr, depth: int) -> Value:
        if depth > MAX_DEPTH:
            self.fail_at(node, f"the expression is nested deeper than {MAX_DEPTH} levels")
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                value = self.constant(node, number)
            case ast.Name(id=name):
                value = self.name(node, name)
            case ast.Subscript(value=ast.Name(id=name), slice=subscript):
                value = self.subscript(node, name, subscript, depth)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                value = self.numeric(operand, depth)
                if isinstance(op, ast.USub):
                    negated = None if value.number is None else -value.number
                    value = Value(-value.expr, value.kind, negated)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                value = Value(sympy.Not(self.condition(operand, depth).expr), Kind.BOOLEAN)
            case ast.BoolOp(op=op, values=operands):
                join = sympy.And if isinstance(op, ast.And) else sympy.Or
                value = Value(join(*[self.condition(o, depth).expr for o in operands]), Kind.BOOLEAN)
            case ast.Compare():
                value = self.comparison(node, depth)
            case ast.BinOp(op=op) if type(op) in OPERATORS:
                value = self.arithmetic(node, depth)
            case ast.Call():
                value = self.call(node, depth)
            case _:
                self.refuse(node)
        return self.checked(node, value)

    def refuse(self, node: ast.expr) -> NoReturn:
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            self.fail_at(node, f"'{node.value}' is no name of the language", f"write '{node.value}'".lower())
        op = getattr(node, "op", node)
        what = {
            ast.Attribute: "attribute access",
            ast.Subscript: "a subscript of anything but a tensor",
            ast.IfExp: "'if ... else'",
            ast.GeneratorExp: "a comprehension",
            ast.ListComp: "a comprehension",
            ast.Tuple: "a list",
            ast.List: "a list",
        }.get(type(node), "this")
        if isinstance(node, ast.BinOp | ast.UnaryOp):
            what = "this operator"
        self.fail_at(node, f"{what} is not part of the expression language", _INSTEAD.get(type(op)))

    def checked(self, node: ast.expr, value: Value) -> Value:
        """Holds a value to what kernels compute with, before sympy's exact arithmetic grows it further."""
        integer = value.kind is Kind.INTEGER
        limit = MAX_INTEGER if integer else MAX_REAL
        if value.number is not None and not abs(value.number) <= limit:
            self.fail_at(node, f"the value is too large: at most {limit:.10g} is understood")
        if value.number is not None and abs(value.number) < MIN_REAL and value.expr != 0:
            self.fail_at(node, f"the value is too small: at least {MIN_REAL:g} is understood")
        if integer and is_integral(value.expr) and has_large_integer(value.expr):
            self.fail_at(node, f"its integers multiply to more than {MAX_INTEGER}")
        if why := misfit(value.expr):
            self.fail_at(node, why)
        if value.expr.has(S.NaN, S.ComplexInfinity, S.Infinity, S.NegativeInfinity, S.ImaginaryUnit):
            self.fail_at(node, "the value is not a real number")
        return value

    def numeric(self, node: ast.expr, depth: int) -> Value:
        return self.number(node, self.within(node, depth))

    def within(self, node: ast.expr, depth: int) -> Value:
        """A part whose choices multiply with those around it."""
        self.reading.enclosed += 1
        value = self.visit(node, depth + 1)
        self.reading.enclosed -= 1
        return value

    def number(self, node: ast.expr, value: Value) -> Value:
        if value.kind is Kind.BOOLEAN:
            self.fail_at(node, "expected a number, but this is a condition", "write where(condition, 1, 0)")
        return value

    def condition(self, node: ast.expr, depth: int) -> Value:
        return self.truth(node, self.visit(node, depth + 1))

    def truth(self, node: ast.expr, value: Value) -> Value:
        if value.kind is not Kind.BOOLEAN:
            self.fail_at(node, f"expected a condition, but this is {value.kind.value}")
        return value

    def constant(self, node: ast.expr, number: int | float) -> Value:
        if isinstance(number, int):
            # before float(), which overflows on what a spec may hold
            if number > MAX_INTEGER:
                hint = "a number may be larger: write 3e9" if number <= MAX_REAL else None
                self.fail_at(node, f"the integer is too large: at most {MAX_INTEGER} is understood", hint)
            return Value(sympy.Integer(number), Kind.INTEGER, float(number))
        if not abs(number) <= MAX_REAL:
            self.fail_at(node, f"the number is too large: at most {MAX_REAL:g} is understood")
        return Value(sympy.Rational(repr(number)), Kind.REAL, number)  # 0.1 is one tenth, as written

    def comparison(self, node: ast.Compare, depth: int) -> Value:
        operands = [node.left, *node.comparators]
        outside = self.reading.choices
        if not self.reading.enclosed:
            self.reading.choices = 0
        values = self.compared(operands, [self.within(operand, depth) for operand in operands])
        if not self.reading.enclosed:
            self.reading.choices = outside
        parts = []
        for op, a, b, right in zip(node.ops, values, values[1:], operands[1:], strict=False):
            if type(op) not in COMPARISONS:
                self.fail_at(right, "'in' and 'is' are not part of the language", "compare with ==")
            part = self.built(right, partial(_compared, COMPARISONS[type(op)], a, b))
            if is_integral(part) and has_large_integer(part):
                self.fail_at(right, f"integers are compared with more than {MAX_INTEGER}")
            parts.append(part)
        return Value(sympy.And(*parts), Kind.BOOLEAN)

    def compared(self, nodes: Sequence[ast.expr], values: Sequence[Value]) -> list[sympy.Basic]:
        """The sides of a comparison: numbers, or the element of a bool tensor beside 0 and 1."""
        flags = all(value.element is not None or value.number in (0, 1) for value in values)
        return [
            value.element if flags and value.element is not None else self.number(node, value).expr
            for node, value in zip(nodes, values, strict=True)
        ]

    def arithmetic(self, node: ast.BinOp, depth: int) -> Value:
        a, b = self.numeric(node.left, depth), self.numeric(node.right, depth)
        op = OPERATORS[type(node.op)]
        whole = a.kind is b.kind is Kind.INTEGER
        kind = Kind.INTEGER if whole and op.symbol != "/" else Kind.REAL
        if op.symbol in ("//", "%"):
            for side, value in ((node.left, a), (node.right, b)):
                self.integer(side, value, f"'{op.symbol}' divides integers")
        if op.symbol in ("/", "//", "%") and b.expr == 0:
            self.fail_at(node.right, "division by zero")
        if op.symbol == "**":
            self.check_power(node, a, b)
            kind = Kind.INTEGER if whole and b.expr.is_nonnegative else Kind.REAL
        number = None
        if a.number is not None and b.number is not None:
            number = self.computed(node, lambda: op.compute(a.number, b.number))
        return Value(op.apply(a.expr, b.expr), kind, number)

    def integer(self, node: ast.expr, value: Value, why: str) -> None:
        """Holds a value to the integers, and its undecided symbols too."""
        if value.kind is not Kind.INTEGER:
            self.fail_at(node, f"{why}, but this is {value.kind.value}", "floor(x) makes a number an integer")
        self.reading.integers |= value.expr.free_symbols

    def check_power(self, node: ast.BinOp, base: Value, exponent: Value) -> None:
        if exponent.number is None:
            self.fail_at(node.right, "the exponent must be a constant")
        if abs(exponent.number) > MAX_EXPONENT:
            self.fail_at(node.right, f"the exponent is too large: at most {MAX_EXPONENT} is understood")
        if not (2 * exponent.expr).is_integer:
            self.fail_at(node.right, "the exponent must be a multiple of 1/2", "write exp(b * log(a))")
        if base.expr == 0 and exponent.number < 0:
            self.fail_at(node.right, "division by zero: 0 to a negative power")

    def computed(self, node: ast.expr, compute: Callable[[], Any]) -> float:
        try:
            return computed(compute)
        except Unfit as unfit:
            self.fail_at(node, str(unfit))

    def built(self, node: ast.expr, build: Callable[[], sympy.Basic]) -> sympy.Basic:
        """sympy compares only what it knows to be real, unlike the logarithm of what may be negative."""
        try:
            return build()
        except (TypeError, ValueError):
            hint = "hold what stands under log and sqrt above 0: log(max(x, 1))"
            self.fail_at(node, "what is compared here is not a real number for all that it reads", hint)

    # -- functions -----------------------------------------------------------------------------------------

    def call(self, node: ast.Call, depth: int) -> Value:
        if not isinstance(node.func, ast.Name):
            hint = did_you_mean("", (), FUNCTIONS)
            self.fail_at(node.func, "only functions of the language can be called", hint)
        name = node.func.id
        if node.keywords:
            self.fail_at(node.keywords[0].value, f"{name}() takes no named arguments")
        if name not in FUNCTIONS:
            return self.entry(node, name, node.args, depth)
        count = len(node.args)
        wanted = {"where": 3, "min": 2, "max": 2}.get(name, 1)
        if count < wanted or (count > wanted and name not in ("min", "max")):
            least = "at least " if name in ("min", "max") else ""
            self.fail_at(node, f"{name}() takes {least}{wanted} argument{'s'[: wanted != 1]}, not {count}")
        if name not in NUMERIC_FUNCTIONS:
            self.choose(node, count)
        if name == "where":
            return self.where(node, depth)
        choice = name not in NUMERIC_FUNCTIONS
        self.reading.nested += choice
        if self.reading.nested > MAX_NESTED_CHOICES:
            self.fail_at(node, f"min, max and abs stand in each other more than {MAX_NESTED_CHOICES} deep")
        values = [self.numeric(argument, depth) for argument in node.args]
        self.reading.nested -= choice
        return self.function(node, name, values)

    def choose(self, node: ast.expr, count: int) -> None:
        """Counts the arguments of min, max, abs and where."""
        self.reading.choices += count
        self.reading.choices_in_all += count
        functions = "min, max, abs and where have more than"
        if self.reading.choices > MAX_CHOICES:
            self.fail_at(node, f"{functions} {MAX_CHOICES} arguments in one comparison or score")
        if self.reading.choices_in_all > MAX_CHOICES_IN_ALL:
            self.fail_at(node, f"{functions} {MAX_CHOICES_IN_ALL} arguments in all")

    def function(self, node: ast.Call, name: str, values: Sequence[Value]) -> Value:
        exprs = [value.expr for value in values]
        numbers = [value.number for value in values if value.number is not None]
        constant = len(numbers) == len(values)
        if name in NUMERIC_FUNCTIONS:
            function = NUMERIC_FUNCTIONS[name]
            number = self.computed(node, lambda: function.compute(numbers[0])) if constant else None
            apply = _floored if name == "floor" else function.apply
            return Value(apply(exprs[0]), function.kind, number)
        kind = Kind.INTEGER if all(value.kind is Kind.INTEGER for value in values) else Kind.REAL
        if name == "abs":
            return Value(sympy.Abs(exprs[0]), kind, abs(numbers[0]) if constant else None)
        join, choose = (sympy.Max, max) if name == "max" else (sympy.Min, min)
        chosen = self.built(node, partial(join, *exprs))
        return Value(chosen, kind, choose(numbers) if constant else None)

    def where(self, node: ast.Call, depth: int) -> Value:
        test = self.truth(node.args[0], self.within(node.args[0], depth))
        then, otherwise = (self.within(argument, depth) for argument in node.args[1:])
        if (then.kind is Kind.BOOLEAN) != (otherwise.kind is Kind.BOOLEAN):
            kinds = f"{then.kind.value} on one side and {otherwise.kind.value} here"
            self.fail_at(node.args[2], f"where() has {kinds}")
        if then.kind is Kind.BOOLEAN:
            choices = (sympy.And(test.expr, then.expr), sympy.And(sympy.Not(test.expr), otherwise.expr))
            return Value(sympy.Or(*choices), Kind.BOOLEAN)
        kind = Kind.INTEGER if then.kind is otherwise.kind is Kind.INTEGER else Kind.REAL
        if test.expr in (sympy.true, sympy.false):
            chosen = then if test.expr == sympy.true else otherwise
            return Value(chosen.expr, kind, chosen.number)
        try:
            # Unevaluated: sympy would otherwise merge nested choices, which takes time without bound.
            choice = sympy.Piecewise((then.expr, test.expr), (otherwise.expr, True), evaluate=False)
        except (
            KeyError
        ):  # sympy 1.14 opens a choice within the condition, and fails where that has no symbols
            hint = "join conditions with and, or, not"
            self.fail_at(node.args[0], "a where() of constants has no place in a condition", hint)
        return Value(choice, kind)


__all__ = ["MAX_CHOICES", "NamedEntries", "Operations", "Reading"]
