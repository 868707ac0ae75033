"""The expression language: text -> sympy, by a grammar of our own and never by `eval` or `sympify`.

Python's `ast` only splits the text into a tree; every node of that tree is then looked up in a whitelist,
typed (boolean, integer or real) and rebuilt as sympy. Specs may come from strangers, so the text is held to a
length, a depth, a number of nodes and a magnitude before anything is computed from it.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

import sympy
from sympy import S

from flashgen.errors import Location, SpecError
from flashgen.spec.functions import modulo, sigmoid
from flashgen.spec.suggest import did_you_mean, quoted

MAX_CHARACTERS = 4096
MAX_DEPTH = 32
MAX_NODES = 300
MAX_CHOICES = 12  # arguments of min, max, abs and where in all: their combinations multiply
MAX_COMPARISONS = 16
MAX_INTEGER = 2**62
MAX_REAL = 1e38  # fp32's range
MAX_EXPONENT = 16

Locate = Callable[[int], Location]
"""Offset in the expression's text -> where that character stands in the file."""


class Kind(Enum):
    """What an expression yields."""

    BOOLEAN = "a condition"
    INTEGER = "an integer"
    REAL = "a number"


def parse_expression(
    text: str, *, names: Mapping[str, sympy.Expr], expect: Kind, locate: Locate | None = None
) -> sympy.Basic:
    """Read one expression.

    `names` are the variables: symbols, integer-valued where they were made with ``integer=True``, or numbers.
    `locate` places errors in the file that the text came from.

    Raises:
        SpecError: anything that is not in the language, at the column where it stands.
    """
    reader = _Reader(names, locate or (lambda offset: Location("<expression>", 1, offset + 1)))
    return reader.read(text, expect)


@dataclass(frozen=True)
class _Value:
    expr: sympy.Basic
    kind: Kind
    number: float | None = None  # its value where it is a constant number


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


_REAL_FUNCTIONS: Mapping[str, tuple[Callable[[sympy.Expr], sympy.Expr], Callable[[float], float]]] = {
    "sqrt": (sympy.sqrt, math.sqrt),
    "exp": (sympy.exp, math.exp),
    "log": (sympy.log, math.log),
    "tanh": (sympy.tanh, math.tanh),
    "sigmoid": (sigmoid, _sigmoid),
}
FUNCTIONS = ("min", "max", "abs", "where", *_REAL_FUNCTIONS)
CONSTANTS: Mapping[str, sympy.Basic] = {"true": sympy.true, "false": sympy.false}

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], sympy.Basic]] = {
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
}
_OPERATORS: Mapping[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
    ast.FloorDiv: ("//", operator.floordiv),
    ast.Mod: ("%", operator.mod),
    ast.Pow: ("**", operator.pow),
}
_INSTEAD: Mapping[type[ast.AST], str] = {
    ast.BitAnd: "write 'and'",
    ast.BitOr: "write 'or'",
    ast.Invert: "write 'not'",
    ast.BitXor: "write '**' for a power",
    ast.IfExp: "write where(condition, a, b)",
}
_UNREADABLE = re.compile(r"[^A-Za-z0-9_ .,+\-*/%<>=!()\[\]&|^~]")
_NUMBER_INTO_NAME = re.compile(
    r"(?<![A-Za-z0-9_.])(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![eE][+-]?\d)(?=[A-Za-z_])"
)
_C_OPERATOR = re.compile(r"&&|\|\||!(?!=)|(?<![<>=!])=(?!=)")
_C_INSTEAD = {"&&": "write 'and'", "||": "write 'or'", "!": "write 'not'", "=": "write '==' to compare"}


class _Reader:
    def __init__(self, names: Mapping[str, sympy.Expr], locate: Locate) -> None:
        self.names = names
        self.locate = locate
        self.choices = 0
        self.start = 0  # of the parsed text within the given one

    def fail(self, message: str, offset: int, hint: str | None = None) -> NoReturn:
        raise SpecError(message, location=self.locate(offset), hint=hint)

    def fail_at(self, node: ast.expr, message: str, hint: str | None = None) -> NoReturn:
        self.fail(message, self.start + node.col_offset, hint)

    def read(self, text: str, expect: Kind) -> sympy.Basic:
        tree = self.split(text)
        value = self.visit(tree, 0)
        if (expect is Kind.BOOLEAN) != (value.kind is Kind.BOOLEAN) or (
            expect is Kind.INTEGER and value.kind is Kind.REAL
        ):
            self.fail_at(tree, f"expected {expect.value}, but this is {value.kind.value}")
        return value.expr

    def split(self, text: str) -> ast.expr:
        if len(text) > MAX_CHARACTERS:
            self.fail(f"the expression has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read", 0)
        text = text.translate({ord(c): " " for c in "\t\r\n"})
        if not text.strip():
            self.fail("the expression is empty", 0)
        self.check_characters(text)
        self.start = len(text) - len(text.lstrip())
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            if wrong := _C_OPERATOR.search(text):
                self.fail(f"'{wrong[0]}' is not an operator here", wrong.start(), _C_INSTEAD[wrong[0]])
            offset = min(max((error.offset or 1) - 1, 0), len(text.strip()))
            self.fail(f"the expression cannot be read from here on ({error.msg})", self.start + offset)
        except (RecursionError, MemoryError):
            self.fail(f"the expression is nested deeper than {MAX_DEPTH} levels", self.start)
        nodes = sum(1 for node in ast.walk(tree) if isinstance(node, ast.expr))
        if nodes > MAX_NODES:
            self.fail(f"the expression has {nodes} terms; at most {MAX_NODES} are read", self.start)
        comparisons = sum(len(node.ops) for node in ast.walk(tree) if isinstance(node, ast.Compare))
        if comparisons > MAX_COMPARISONS:
            limit = f"at most {MAX_COMPARISONS} are read"
            self.fail(f"the expression has {comparisons} comparisons; {limit}", self.start)
        return tree

    def check_characters(self, text: str) -> None:
        if wrong := _UNREADABLE.search(text):
            self.fail(f"{quoted(wrong[0])} is not part of the expression language", wrong.start())
        if wrong := _NUMBER_INTO_NAME.search(text):
            self.fail(f"the number {quoted(wrong[0])} runs into a name", wrong.start())
        opened: list[int] = []
        for offset, character in enumerate(text):
            if character in "([":
                opened.append(offset)
                if len(opened) > MAX_DEPTH:
                    self.fail(f"the expression is nested deeper than {MAX_DEPTH} levels", offset)
            elif character in ")]" and (not opened or text[opened.pop()] + character not in ("()", "[]")):
                self.fail(f"'{character}' closes nothing", offset)
        if opened:
            self.fail(f"'{text[opened[-1]]}' is never closed", opened[-1])

    # -- one node ------------------------------------------------------------------------------------------

    def visit(self, node: ast.expr, depth: int) -> _Value:
        if depth > MAX_DEPTH:
            self.fail_at(node, f"the expression is nested deeper than {MAX_DEPTH} levels")
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                value = self.constant(node, number)
            case ast.Name(id=name):
                value = self.name(node, name)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                value = self.numeric(operand, depth)
                if isinstance(op, ast.USub):
                    negated = None if value.number is None else -value.number
                    value = _Value(-value.expr, value.kind, negated)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                value = _Value(sympy.Not(self.condition(operand, depth).expr), Kind.BOOLEAN)
            case ast.BoolOp(op=op, values=operands):
                join = sympy.And if isinstance(op, ast.And) else sympy.Or
                value = _Value(join(*[self.condition(o, depth).expr for o in operands]), Kind.BOOLEAN)
            case ast.Compare():
                value = self.comparison(node, depth)
            case ast.BinOp(op=op) if type(op) in _OPERATORS:
                value = self.arithmetic(node, depth)
            case ast.Call():
                value = self.call(node, depth)
            case _:
                self.refuse(node)
        return self.checked(node, value)

    def refuse(self, node: ast.expr) -> NoReturn:
        op = getattr(node, "op", node)
        what = {
            ast.Attribute: "attribute access",
            ast.Subscript: "indexing",
            ast.IfExp: "'if ... else'",
            ast.GeneratorExp: "a comprehension",
            ast.ListComp: "a comprehension",
            ast.Tuple: "a list",
            ast.List: "a list",
        }.get(type(node), "this")
        if isinstance(node, ast.BinOp | ast.UnaryOp):
            what = "this operator"
        self.fail_at(node, f"{what} is not part of the expression language", _INSTEAD.get(type(op)))

    def checked(self, node: ast.expr, value: _Value) -> _Value:
        limit = MAX_INTEGER if value.kind is Kind.INTEGER else MAX_REAL
        if value.number is not None and not abs(value.number) <= limit:
            self.fail_at(node, f"the value is too large: at most {limit:.3g} is understood")
        if value.expr.has(S.NaN, S.ComplexInfinity, S.Infinity, S.NegativeInfinity, S.ImaginaryUnit):
            self.fail_at(node, "the value is not a real number")
        return value

    def numeric(self, node: ast.expr, depth: int) -> _Value:
        value = self.visit(node, depth + 1)
        if value.kind is Kind.BOOLEAN:
            self.fail_at(node, "expected a number, but this is a condition", "write where(condition, 1, 0)")
        return value

    def condition(self, node: ast.expr, depth: int) -> _Value:
        value = self.visit(node, depth + 1)
        if value.kind is not Kind.BOOLEAN:
            self.fail_at(node, f"expected a condition, but this is {value.kind.value}")
        return value

    def constant(self, node: ast.expr, number: int | float) -> _Value:
        if isinstance(number, int):
            # before float(), which overflows on what a spec may hold
            if number > MAX_INTEGER:
                self.fail_at(node, f"the integer is too large: at most {MAX_INTEGER} is understood")
            return _Value(sympy.Integer(number), Kind.INTEGER, float(number))
        if not abs(number) <= MAX_REAL:
            self.fail_at(node, f"the number is too large: at most {MAX_REAL:g} is understood")
        return _Value(sympy.Rational(repr(number)), Kind.REAL, number)  # 0.1 is one tenth, as written

    def name(self, node: ast.expr, name: str) -> _Value:
        if name in CONSTANTS:
            return _Value(CONSTANTS[name], Kind.BOOLEAN)
        if name in FUNCTIONS:
            self.fail_at(node, f"'{name}' is a function: write {name}(...)")
        if name not in self.names:
            known = [*self.names, *FUNCTIONS, *CONSTANTS]
            self.fail_at(node, f"unknown name {quoted(name)}", did_you_mean(name, known, list(self.names)))
        expr = self.names[name]
        kind = Kind.INTEGER if expr.is_integer else Kind.REAL
        return _Value(expr, kind, float(expr) if expr.is_number else None)

    def comparison(self, node: ast.Compare, depth: int) -> _Value:
        operands = [node.left, *node.comparators]
        values = [self.numeric(operand, depth) for operand in operands]
        parts = []
        for op, a, b, right in zip(node.ops, values, values[1:], operands[1:], strict=False):
            if type(op) not in _COMPARISONS:
                self.fail_at(right, "'in' and 'is' are not part of the language", "compare with ==")
            parts.append(_COMPARISONS[type(op)](a.expr, b.expr))
        return _Value(sympy.And(*parts), Kind.BOOLEAN)

    def arithmetic(self, node: ast.BinOp, depth: int) -> _Value:
        a, b = self.numeric(node.left, depth), self.numeric(node.right, depth)
        symbol, compute = _OPERATORS[type(node.op)]
        whole = a.kind is b.kind is Kind.INTEGER
        kind = Kind.INTEGER if whole and symbol != "/" else Kind.REAL
        if symbol in ("//", "%") and not whole:
            wrong = node.right if a.kind is Kind.INTEGER else node.left
            self.fail_at(wrong, f"'{symbol}' divides integers, but this is a number with a fraction")
        if symbol in ("/", "//", "%") and b.expr == 0:
            self.fail_at(node.right, "division by zero")
        if symbol == "**":
            self.check_power(node, a, b)
            kind = Kind.INTEGER if whole and b.expr.is_nonnegative else Kind.REAL
        number = None
        if a.number is not None and b.number is not None:
            number = self.computed(node, lambda: compute(a.number, b.number))
        if symbol == "//":
            return _Value(sympy.floor(a.expr / b.expr), kind, number)
        if symbol == "%":
            return _Value(modulo(a.expr, b.expr), kind, number)
        return _Value(compute(a.expr, b.expr), kind, number)

    def check_power(self, node: ast.BinOp, base: _Value, exponent: _Value) -> None:
        if exponent.number is None:
            self.fail_at(node.right, "the exponent must be a constant")
        if abs(exponent.number) > MAX_EXPONENT:
            self.fail_at(node.right, f"the exponent is too large: at most {MAX_EXPONENT} is understood")
        if not (2 * exponent.expr).is_integer:
            self.fail_at(node.right, "the exponent must be a multiple of 1/2", "write exp(b * log(a))")
        if base.expr == 0 and exponent.number < 0:
            self.fail_at(node.right, "division by zero: 0 to a negative power")

    def call(self, node: ast.Call, depth: int) -> _Value:
        if not isinstance(node.func, ast.Name):
            hint = did_you_mean("", (), FUNCTIONS)
            self.fail_at(node.func, "only functions of the language can be called", hint)
        name = node.func.id
        if name not in FUNCTIONS:
            hint = did_you_mean(name, FUNCTIONS, FUNCTIONS)
            self.fail_at(node.func, f"unknown function {quoted(name)}", hint)
        if node.keywords:
            self.fail_at(node.keywords[0].value, f"{name}() takes no named arguments")
        count = len(node.args)
        wanted = {"where": 3, "min": 2, "max": 2}.get(name, 1)
        if count < wanted or (count > wanted and name not in ("min", "max")):
            least = "at least " if name in ("min", "max") else ""
            self.fail_at(node, f"{name}() takes {least}{wanted} argument{'s'[: wanted != 1]}, not {count}")
        if name not in _REAL_FUNCTIONS:
            self.choices += count
            if self.choices > MAX_CHOICES:
                self.fail_at(node, f"min, max, abs and where have more than {MAX_CHOICES} arguments in all")
        if name == "where":
            return self.where(node, depth)
        values = [self.numeric(argument, depth) for argument in node.args]
        numbers = [value.number for value in values if value.number is not None]
        constant = len(numbers) == len(values)
        if name in _REAL_FUNCTIONS:
            symbolic, numeric = _REAL_FUNCTIONS[name]
            number = self.computed(node, lambda: numeric(numbers[0])) if constant else None
            return _Value(symbolic(values[0].expr), Kind.REAL, number)
        kind = Kind.INTEGER if all(value.kind is Kind.INTEGER for value in values) else Kind.REAL
        if name == "abs":
            return _Value(sympy.Abs(values[0].expr), kind, abs(numbers[0]) if constant else None)
        join, choose = (sympy.Max, max) if name == "max" else (sympy.Min, min)
        return _Value(join(*[value.expr for value in values]), kind, choose(numbers) if constant else None)

    def where(self, node: ast.Call, depth: int) -> _Value:
        test = self.condition(node.args[0], depth)
        then, otherwise = (self.visit(argument, depth + 1) for argument in node.args[1:])
        if (then.kind is Kind.BOOLEAN) != (otherwise.kind is Kind.BOOLEAN):
            kinds = f"{then.kind.value} on one side and {otherwise.kind.value} here"
            self.fail_at(node.args[2], f"where() has {kinds}")
        if then.kind is Kind.BOOLEAN:
            choices = (sympy.And(test.expr, then.expr), sympy.And(sympy.Not(test.expr), otherwise.expr))
            return _Value(sympy.Or(*choices), Kind.BOOLEAN)
        kind = Kind.INTEGER if then.kind is otherwise.kind is Kind.INTEGER else Kind.REAL
        if test.expr in (sympy.true, sympy.false):
            chosen = then if test.expr == sympy.true else otherwise
            return _Value(chosen.expr, kind, chosen.number)
        # Unevaluated: sympy would otherwise merge nested choices, which takes time without bound.
        choice = sympy.Piecewise((then.expr, test.expr), (otherwise.expr, True), evaluate=False)
        return _Value(choice, kind)

    def computed(self, node: ast.expr, compute: Callable[[], Any]) -> float:
        """A constant's value in floats, asked for before sympy's exact arithmetic is let loose on it."""
        try:
            number = compute()
        except OverflowError:
            self.fail_at(node, f"the value is too large: at most {MAX_REAL:g} is understood")
        except ZeroDivisionError:
            self.fail_at(node, "division by zero")
        except ValueError:
            self.fail_at(node, "the value is not a real number")
        if isinstance(number, complex):
            self.fail_at(node, "the value is not a real number")
        if not abs(number) <= MAX_REAL:
            self.fail_at(node, f"the value is too large: at most {MAX_REAL:g} is understood")
        return float(number)


__all__ = ["CONSTANTS", "FUNCTIONS", "Kind", "Locate", "parse_expression"]
