"""The expression language: text -> sympy, by a grammar of our own and never by `eval` or `sympify`.

Every node of the text's tree (`flashgen.spec.syntax`) is looked up in a whitelist, typed (a condition, an
integer or a number) and rebuilt as sympy. Entries of the gallery are read where they are named, as if in
brackets, and the limits count all that is read.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import sympy
from sympy import S

from flashgen.errors import SpecError
from flashgen.spec.gallery import Entry
from flashgen.spec.inputs import AXES, TensorInput
from flashgen.spec.suggest import did_you_mean, quoted
from flashgen.spec.syntax import MAX_COMPARISONS, MAX_DEPTH, MAX_NODES, Locate, nowhere, split
from flashgen.spec.values import (
    COMPARISONS,
    CONSTANTS,
    FUNCTIONS,
    MAX_EXPONENT,
    MAX_INTEGER,
    MAX_REAL,
    NUMERIC_FUNCTIONS,
    OPERATORS,
    Kind,
    Unfit,
    Value,
    computed,
    symbolic,
)

MAX_CHOICES = 16  # arguments of min, max, abs and where in all: their combinations multiply


@dataclass(frozen=True)
class Scope:
    """What names stand for. One that stands in several of these is the first of them.

    Variables and parameters are symbols, integers where they were made with ``integer=True``, or numbers. The
    formulas of `entries` see the variables, the tensors and each other.
    """

    variables: Mapping[str, sympy.Expr]
    parameters: Mapping[str, sympy.Expr] = field(default_factory=dict)
    tensors: Mapping[str, TensorInput] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)


@dataclass
class Reading:
    """What was read: the mathematics, and what it takes.

    `tensors` are those that entries of the gallery brought along, `integers` the symbols that stood where
    only an integer may, `sink` whether an entry asks for one, `call` the entry and its arguments where the
    text is nothing else. The counts are held to the language's limits.
    """

    expr: sympy.Basic = S.Zero
    tensors: dict[str, TensorInput] = field(default_factory=dict)
    integers: set[sympy.Symbol] = field(default_factory=set)
    sink: bool = False
    call: tuple[str, tuple[sympy.Expr, ...]] | None = None
    nodes: int = 0
    comparisons: int = 0
    choices: int = 0


def read_expression(text: str, scope: Scope, expect: Kind, locate: Locate = nowhere) -> Reading:
    """Read one expression. `locate` places errors in the file that the text came from.

    Raises:
        SpecError: anything that is not in the language, at the column where it stands.
    """
    reading = Reading()
    reading.expr = _Reader(scope, locate, reading).read(text, expect).expr
    return reading


def parse_expression(
    text: str,
    *,
    names: Mapping[str, sympy.Expr],
    expect: Kind,
    tensors: Mapping[str, TensorInput] | None = None,
    locate: Locate = nowhere,
) -> sympy.Basic:
    """`read_expression` with nothing of the gallery in scope: the mathematics alone.

    Raises:
        SpecError: anything that is not in the language, at the column where it stands.
    """
    return read_expression(text, Scope(names, tensors=tensors or {}), expect, locate).expr


_INSTEAD: Mapping[type[ast.AST], str] = {
    ast.BitAnd: "write 'and'",
    ast.BitOr: "write 'or'",
    ast.Invert: "write 'not'",
    ast.BitXor: "write '**' for a power",
    ast.IfExp: "write where(condition, a, b)",
}


class _Reader:
    """Reads one text. `bound` are the values of an entry's parameters, `trail` the entries being read."""

    def __init__(
        self,
        scope: Scope,
        locate: Locate,
        reading: Reading,
        bound: Mapping[str, Value] | None = None,
        trail: tuple[str, ...] = (),
    ) -> None:
        self.scope = scope
        self.locate = locate
        self.reading = reading
        self.bound = bound or {}
        self.trail = trail
        self.tree: ast.expr | None = None
        self.start = 0  # of the tree's text within the given one

    def fail(self, message: str, offset: int, hint: str | None = None) -> NoReturn:
        within = f"in {self.trail[-1]}: " if self.trail else ""
        raise SpecError(within + message, location=self.locate(offset), hint=hint)

    def fail_at(self, node: ast.expr, message: str, hint: str | None = None) -> NoReturn:
        self.fail(message, self.start + node.col_offset, hint)

    def read(self, text: str, expect: Kind) -> Value:
        tree, self.start = split(text, self.locate)
        self.tree = tree
        self.count(tree)
        value = self.visit(tree, 0)
        if (expect is Kind.BOOLEAN) != (value.kind is Kind.BOOLEAN) or (
            expect is Kind.INTEGER and value.kind is Kind.REAL
        ):
            self.fail_at(tree, f"expected {expect.value}, but this is {value.kind.value}")
        return value

    def count(self, tree: ast.expr) -> None:
        reading = self.reading
        for node in ast.walk(tree):
            reading.nodes += isinstance(node, ast.expr)
            reading.comparisons += len(node.ops) if isinstance(node, ast.Compare) else 0
        for count, most, what in (
            (reading.nodes, MAX_NODES, "terms"),
            (reading.comparisons, MAX_COMPARISONS, "comparisons"),
        ):
            if count > most:
                self.fail(f"the expression has {count} {what}; at most {most} are read", self.start)

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
        limit = MAX_INTEGER if value.kind is Kind.INTEGER else MAX_REAL
        if value.number is not None and not abs(value.number) <= limit:
            self.fail_at(node, f"the value is too large: at most {limit:.3g} is understood")
        if value.expr.has(S.NaN, S.ComplexInfinity, S.Infinity, S.NegativeInfinity, S.ImaginaryUnit):
            self.fail_at(node, "the value is not a real number")
        return value

    def numeric(self, node: ast.expr, depth: int) -> Value:
        return self.number(node, self.visit(node, depth + 1))

    def number(self, node: ast.expr, value: Value) -> Value:
        if value.kind is Kind.BOOLEAN:
            self.fail_at(node, "expected a number, but this is a condition", "write where(condition, 1, 0)")
        return value

    def condition(self, node: ast.expr, depth: int) -> Value:
        value = self.visit(node, depth + 1)
        if value.kind is not Kind.BOOLEAN:
            self.fail_at(node, f"expected a condition, but this is {value.kind.value}")
        return value

    def constant(self, node: ast.expr, number: int | float) -> Value:
        if isinstance(number, int):
            # before float(), which overflows on what a spec may hold
            if number > MAX_INTEGER:
                self.fail_at(node, f"the integer is too large: at most {MAX_INTEGER} is understood")
            return Value(sympy.Integer(number), Kind.INTEGER, float(number))
        if not abs(number) <= MAX_REAL:
            self.fail_at(node, f"the number is too large: at most {MAX_REAL:g} is understood")
        return Value(sympy.Rational(repr(number)), Kind.REAL, number)  # 0.1 is one tenth, as written

    def comparison(self, node: ast.Compare, depth: int) -> Value:
        operands = [node.left, *node.comparators]
        values = [self.compared(operand, depth) for operand in operands]
        parts = []
        for op, a, b, right in zip(node.ops, values, values[1:], operands[1:], strict=False):
            if type(op) not in COMPARISONS:
                self.fail_at(right, "'in' and 'is' are not part of the language", "compare with ==")
            parts.append(COMPARISONS[type(op)](a, b))
        return Value(sympy.And(*parts), Kind.BOOLEAN)

    def compared(self, node: ast.expr, depth: int) -> sympy.Basic:
        """A side of a comparison. The element of a bool tensor may stand here too, as 0 or 1."""
        value = self.visit(node, depth + 1)
        return value.element if value.element is not None else self.number(node, value).expr

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

    # -- functions -----------------------------------------------------------------------------------------

    def call(self, node: ast.Call, depth: int) -> Value:
        if not isinstance(node.func, ast.Name):
            hint = did_you_mean("", (), FUNCTIONS)
            self.fail_at(node.func, "only functions of the language can be called", hint)
        name = node.func.id
        if node.keywords:
            self.fail_at(node.keywords[0].value, f"{name}() takes no named arguments")
        if name not in FUNCTIONS and name in self.scope.entries:
            return self.entry(node, self.scope.entries[name], node.args, depth)
        if name not in FUNCTIONS:
            hint = did_you_mean(name, [*FUNCTIONS, *self.scope.entries], FUNCTIONS)
            self.fail_at(node.func, f"unknown function {quoted(name)}", hint)
        count = len(node.args)
        wanted = {"where": 3, "min": 2, "max": 2}.get(name, 1)
        if count < wanted or (count > wanted and name not in ("min", "max")):
            least = "at least " if name in ("min", "max") else ""
            self.fail_at(node, f"{name}() takes {least}{wanted} argument{'s'[: wanted != 1]}, not {count}")
        if name not in NUMERIC_FUNCTIONS:
            self.reading.choices += count
            if self.reading.choices > MAX_CHOICES:
                self.fail_at(node, f"min, max, abs and where have more than {MAX_CHOICES} arguments in all")
        if name == "where":
            return self.where(node, depth)
        return self.function(node, name, [self.numeric(argument, depth) for argument in node.args])

    def function(self, node: ast.Call, name: str, values: Sequence[Value]) -> Value:
        exprs = [value.expr for value in values]
        numbers = [value.number for value in values if value.number is not None]
        constant = len(numbers) == len(values)
        if name in NUMERIC_FUNCTIONS:
            function = NUMERIC_FUNCTIONS[name]
            number = self.computed(node, lambda: function.compute(numbers[0])) if constant else None
            return Value(function.apply(exprs[0]), function.kind, number)
        kind = Kind.INTEGER if all(value.kind is Kind.INTEGER for value in values) else Kind.REAL
        if name == "abs":
            return Value(sympy.Abs(exprs[0]), kind, abs(numbers[0]) if constant else None)
        join, choose = (sympy.Max, max) if name == "max" else (sympy.Min, min)
        return Value(join(*exprs), kind, choose(numbers) if constant else None)

    def where(self, node: ast.Call, depth: int) -> Value:
        test = self.condition(node.args[0], depth)
        then, otherwise = (self.visit(argument, depth + 1) for argument in node.args[1:])
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
        # Unevaluated: sympy would otherwise merge nested choices, which takes time without bound.
        choice = sympy.Piecewise((then.expr, test.expr), (otherwise.expr, True), evaluate=False)
        return Value(choice, kind)

    # -- names ---------------------------------------------------------------------------------------------

    def name(self, node: ast.expr, name: str) -> Value:
        scope = self.scope
        if name in CONSTANTS:
            return Value(CONSTANTS[name], Kind.BOOLEAN)
        if name in self.bound:
            return self.bound[name]
        for names in (scope.variables, scope.parameters):
            if name in names:
                return symbolic(names[name])
        if name in scope.tensors:
            return self.whole(node, scope.tensors[name])
        if name in FUNCTIONS:
            self.fail_at(node, f"'{name}' is a function: write {name}(...)")
        if name in scope.entries:
            return self.entry(node, scope.entries[name], (), 0)
        self.unknown(node, name)

    def unknown(self, node: ast.expr, name: str) -> NoReturn:
        scope = self.scope
        named = [*self.bound, *scope.variables, *scope.parameters, *scope.tensors]
        hint = did_you_mean(name, [*named, *scope.entries, *FUNCTIONS, *CONSTANTS], named)
        if entries := ", ".join(entry.call for entry in scope.entries.values()):
            hint += f"; named: {entries}"
        self.fail_at(node, f"unknown name {quoted(name)}", hint)

    def entry(self, node: ast.expr, entry: Entry, arguments: Sequence[ast.expr], depth: int) -> Value:
        """An entry of the gallery, its parameters standing for the arguments."""
        if entry.name in self.trail:
            circle = " -> ".join((*self.trail[self.trail.index(entry.name) :], entry.name))
            self.fail_at(node, f"'{entry.name}' is defined by itself: {circle}")
        if entry.kind == "score" and "score" not in self.scope.variables:
            self.fail_at(node, f"'{entry.name}' is a score: it has no place in a mask")
        wanted, given = len(entry.parameters), len(arguments)
        if wanted != given:
            takes = f"takes {wanted or 'no'} value{'s'[: wanted != 1]}"
            self.fail_at(node, f"'{entry.name}' {takes}, not {given}", f"write {entry.call}")
        bound = {}
        for parameter, argument in zip(entry.parameters, arguments, strict=True):
            value = self.numeric(argument, depth)
            if parameter.kind == "int":
                self.integer(argument, value, f"{parameter.name} of '{entry.name}' must be an integer")
            if parameter.least is not None and value.number is not None and value.number < parameter.least:
                least = f"{parameter.name} of '{entry.name}' must be at least {parameter.least}"
                self.fail_at(argument, f"{least}, but this is {value.number:g}")
            bound[parameter.name] = value
        if node is self.tree and not self.trail:
            self.reading.call = (entry.name, tuple(value.expr for value in bound.values()))
        tensors = {tensor.name: self.scope.tensors.get(tensor.name, tensor) for tensor in entry.tensors}
        self.reading.tensors |= tensors
        self.reading.sink |= entry.sink
        place = self.locate(self.start + node.col_offset)
        scope = Scope(self.scope.variables, tensors=tensors, entries=self.scope.entries)
        reader = _Reader(scope, lambda offset: place, self.reading, bound, (*self.trail, entry.name))
        return reader.read(entry.formula, Kind.BOOLEAN if entry.kind == "mask" else Kind.REAL)

    # -- elements of tensors -------------------------------------------------------------------------------

    def whole(self, node: ast.expr, tensor: TensorInput) -> Value:
        """A tensor without subscripts: every axis at its own variable."""
        if any(isinstance(axis, int) for axis in tensor.index):
            table = ", ".join(str(axis) for axis in tensor.index)
            self.fail_at(node, f"'{tensor.name}' needs a subscript: its axes are [{table}]")
        return self.element(tensor, [AXES[str(axis)] for axis in tensor.index])

    def subscript(self, node: ast.expr, name: str, subscript: ast.expr, depth: int) -> Value:
        """``bias[head, q, kv]``; the axes batch, head and head_kv may be left out."""
        if name not in self.scope.tensors:
            known = self.scope.tensors
            if name in self.scope.variables or name in self.scope.parameters or name in self.bound:
                self.fail_at(node, f"'{name}' is no tensor: it takes no subscript")
            hint = did_you_mean(name, known, known) or "declare it under attention.tensors"
            self.fail_at(node, f"unknown tensor {quoted(name)}", hint)
        tensor = self.scope.tensors[name]
        given = list(subscript.elts) if isinstance(subscript, ast.Tuple) else [subscript]
        form = f"the axes of '{name}' are [{', '.join(map(str, tensor.index))}]"
        subscripts = []
        for axis in tensor.index:
            own = bool(given) and isinstance(given[0], ast.Name) and given[0].id == axis
            if axis in ("batch", "head", "head_kv"):
                subscripts.append(AXES[str(axis)])
                if own:
                    given.pop(0)
                continue
            if not given:
                self.fail_at(node, f"a subscript is missing: {form}")
            first = given.pop(0)
            value = self.numeric(first, depth)
            self.integer(first, value, f"a subscript must be an integer ({form})")
            subscripts.append(value.expr)
        if given:
            one = "one subscript too many, or out of its place"
            self.fail_at(given[0], f"{one}: {form}", "on batch, head and head_kv only that name may stand")
        return self.element(tensor, subscripts)

    def element(self, tensor: TensorInput, subscripts: Sequence[sympy.Expr]) -> Value:
        element = tensor.function(*subscripts)
        if tensor.dtype == "bool":
            return Value(sympy.Ne(element, 0), Kind.BOOLEAN, element=element)
        return Value(element, Kind.INTEGER if tensor.dtype == "int32" else Kind.REAL)


__all__ = [
    "CONSTANTS",
    "FUNCTIONS",
    "MAX_CHOICES",
    "Kind",
    "Locate",
    "Reading",
    "Scope",
    "parse_expression",
    "read_expression",
]
