"""The expression language: text -> sympy, by a grammar of our own and never by `eval` or `sympify`.

Every node of the text's tree (`flashgen.spec.syntax`) is looked up in a whitelist, typed (a condition, an
integer or a number) and rebuilt as sympy. Entries of the gallery are read where they are named, as if in
brackets, and the limits count all that is read.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import sympy
from sympy.core.relational import Relational

from flashgen.errors import SpecError
from flashgen.spec.gallery import Entry
from flashgen.spec.inputs import AXES, TensorInput
from flashgen.spec.operations import MAX_CHOICES, NamedEntries, Operations, Reading
from flashgen.spec.printer import to_text
from flashgen.spec.suggest import did_you_mean, quoted
from flashgen.spec.sums import counted_twice
from flashgen.spec.symbols import KV, Q
from flashgen.spec.syntax import MAX_COMPARISONS, MAX_NODES, Locate, nowhere, split
from flashgen.spec.values import CONSTANTS, FUNCTIONS, Kind, Value, symbolic


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


def read_expression(text: str, scope: Scope, expect: Kind, locate: Locate = nowhere) -> Reading:
    """Read one expression. `locate` places errors in the file that the text came from.

    Raises:
        SpecError: anything that is not in the language, at the column where it stands.
    """
    reading = Reading()
    reading.expr = _Reader(scope, locate, reading).read(text, expect).expr
    _check_written_out(reading, scope, expect, locate)
    return reading


def _check_written_out(reading: Reading, scope: Scope, expect: Kind, locate: Locate) -> None:
    """Holds to the limits what entries and where() become, since plans are kept as text too."""
    scope = replace(scope, tensors={**scope.tensors, **reading.tensors}, entries={})
    try:
        _Reader(scope, nowhere, Reading()).read(to_text(reading.expr), expect)
    except SpecError as error:
        (problem,) = error.problems
        raise SpecError(f"written out, {problem.message}", location=locate(0)) from None


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
    return _Reader(Scope(names, tensors=tensors or {}), locate, Reading()).read(text, expect).expr


class _Reader(Operations):
    """Reads one text. `bound` are the values of an entry's parameters, `trail` the entries being read."""

    def __init__(
        self,
        scope: Scope,
        locate: Locate,
        reading: Reading,
        bound: Mapping[str, Value] | None = None,
        trail: tuple[str, ...] = (),
    ) -> None:
        super().__init__(reading)
        self.scope = scope
        self.locate = locate
        self.bound = bound or {}
        self.trail = trail
        self.calls: dict[ast.expr, tuple[str, tuple[sympy.Expr, ...]]] = {}
        self.start = 0  # of the tree's text within the given one

    def fail(self, message: str, offset: int, hint: str | None = None) -> NoReturn:
        within = f"in {self.trail[-1]}: " if self.trail else ""
        raise SpecError(within + message, location=self.locate(offset), hint=hint)

    def fail_at(self, node: ast.expr, message: str, hint: str | None = None) -> NoReturn:
        self.fail(message, self.start + node.col_offset, hint)

    def read(self, text: str, expect: Kind) -> Value:
        tree, self.start = split(text, self.locate)
        self.count(tree)
        value = self.visit(tree, 0)
        if (expect is Kind.BOOLEAN) != (value.kind is Kind.BOOLEAN) or (
            expect is Kind.INTEGER and value.kind is Kind.REAL
        ):
            self.fail_at(tree, f"expected {expect.value}, but this is {value.kind.value}")
        if not self.trail:
            self.check_sums(tree)
            self.reading.named = self.named(tree)
        return value

    def check_sums(self, tree: ast.expr) -> None:
        """Refuses sums of named scores, each of which has `score` in it."""
        scores: dict[ast.AST, Entry] = {}
        for node, (name, _) in self.calls.items():
            if self.scope.entries[name].kind == "score":
                scores[node] = self.scope.entries[name]
        if scores and (wrong := counted_twice(tree, scores)):
            self.fail_at(wrong.term, wrong.message, wrong.hint)

    def named(self, tree: ast.expr) -> NamedEntries | None:
        parts = tree.values if isinstance(tree, ast.BoolOp) else [tree]
        if not all(part in self.calls for part in parts):
            return None
        disjoined = isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.Or)
        return NamedEntries(tuple(self.calls[part] for part in parts), "or" if disjoined else "and")

    def count(self, tree: ast.expr) -> None:
        reading = self.reading
        for node in ast.walk(tree):
            reading.nodes += isinstance(node, ast.expr)
            reading.comparisons += len(node.ops) if isinstance(node, ast.Compare) else 0
        self.check_counts()

    def count_again(self, node: ast.expr, argument: sympy.Basic) -> None:
        """An argument counts wherever its parameter stands: softcap(softcap(..)) doubles each time."""
        for part in sympy.preorder_traversal(argument):
            self.reading.nodes += 1
            self.reading.comparisons += isinstance(part, Relational)
            if isinstance(part, sympy.Max | sympy.Min | sympy.Abs | sympy.Piecewise):
                self.choose(node, 3 if isinstance(part, sympy.Piecewise) else len(part.args))
        self.check_counts()

    def check_counts(self) -> None:
        reading = self.reading
        for count, most, what in (
            (reading.nodes, MAX_NODES, "terms"),
            (reading.comparisons, MAX_COMPARISONS, "comparisons"),
        ):
            if count > most:
                self.fail(f"the expression has {count} {what}; at most {most} are read", self.start)

    # -- names ---------------------------------------------------------------------------------------------

    def name(self, node: ast.expr, name: str) -> Value:
        scope = self.scope
        if name in CONSTANTS:
            return Value(CONSTANTS[name], Kind.BOOLEAN)
        if name in self.bound:
            value = self.bound[name]
            self.count_again(node, value.expr)
            return value
        for names in (scope.variables, scope.parameters):
            if name in names:
                if names is scope.parameters:
                    self.reading.mentioned.add(name)
                return symbolic(names[name])
        if name in scope.tensors:
            return self.whole(node, scope.tensors[name])
        if name in FUNCTIONS:
            self.fail_at(node, f"'{name}' is a function: write {name}(...)")
        if name in scope.entries:
            return self.entry(node, name, (), 0)
        self.unknown(node, name)

    def unknown(self, node: ast.expr, name: str) -> NoReturn:
        scope = self.scope
        named = [*self.bound, *scope.variables, *scope.parameters, *scope.tensors]
        masks = [entry.name for entry in scope.entries.values() if entry.kind == "mask"]
        entries = self.own_entries()
        known = [*named, *entries, *masks, *FUNCTIONS, *CONSTANTS]
        hint = did_you_mean(name, known, [*named, *entries])
        self.fail_at(node, f"unknown name {quoted(name)}", hint)

    def own_entries(self) -> list[str]:
        """The gallery's masks in a mask, its scores in a score."""
        kind = "score" if "score" in self.scope.variables else "mask"
        return [entry.name for entry in self.scope.entries.values() if entry.kind == kind]

    def entry(self, node: ast.expr, name: str, arguments: Sequence[ast.expr], depth: int) -> Value:
        """An entry of the gallery, its parameters standing for the arguments."""
        if name not in self.scope.entries:
            hint = did_you_mean(name, [*FUNCTIONS, *self.scope.entries], [*FUNCTIONS, *self.own_entries()])
            called = node.func if isinstance(node, ast.Call) else node
            self.fail_at(called, f"unknown function {quoted(name)}", hint)
        entry = self.scope.entries[name]
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
        self.calls[node] = (entry.name, tuple(value.expr for value in bound.values()))
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
            hint = did_you_mean(name, known) or "declare it under attention.tensors"
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
        at = dict(zip(tensor.index, subscripts, strict=True))
        if at.get("q") == KV and at.get("kv") == Q:
            hint = (
                f"where the transposed element is meant, declare '{name}' with q and kv the other way round"
            )
            self.fail_at(subscript, f"the subscripts are not in the order of the axes: {form}", hint)
        return self.element(tensor, subscripts)

    def element(self, tensor: TensorInput, subscripts: Sequence[sympy.Expr]) -> Value:
        self.reading.mentioned.add(tensor.name)
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
