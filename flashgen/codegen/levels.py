"""Where the parts of an expression are computed: once per head, per query, per row of a tile, or per element.

An element stands at ``kv + c``: `kv` is the position of a thread's first column, `c` the offset from it,
which the compiler knows once the loop is unrolled. What a query has without its keys is kept through the loop
over them where it costs something; adding two numbers again takes no register. What an inner level needs of
an outer one is a member of the outer one's struct; what a level needs twice is a variable.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import sympy
from sympy.core.function import AppliedUndef

from flashgen.codegen.identifiers import identifier
from flashgen.codegen.printer import bracketed
from flashgen.spec.functions import COSTLY
from flashgen.spec.symbols import KV, SCALE, SCORE, Q

Level = Literal["constant", "head", "query", "row", "element"]
Kind = Literal["int", "int64_t", "float", "bool"]

LEVELS: tuple[Level, ...] = ("constant", "head", "query", "row", "element")

# Symbols of the printer, whose names no expression can hold; they print without the stroke but for the first.
FIRST_KV = sympy.Symbol("kv'", integer=True)  # position of the thread's first column
COLUMN = sympy.Symbol("c'", integer=True)
PRODUCT = sympy.Symbol("s'", real=True)  # Q . K, before the scale
FOUND = "key_found"  # so begin the names of what a search in a sorted tensor finds for a row
TANH = sympy.Symbol("t'", real=True)  # a tanh that is computed beforehand

_EVERYWHERE = re.compile(r"-?(params\.[\w.]+|\d[\w.+-]*|true|false)")


def levelled(expr: sympy.Basic) -> sympy.Basic:
    """A mask or score with `kv` split into the thread's first column and the offset from it."""
    return expr.xreplace({KV: FIRST_KV + COLUMN, SCORE: SCALE * PRODUCT})


def level_of(expr: sympy.Basic) -> Level:
    """Of the innermost thing that the expression depends on."""
    free = expr.free_symbols
    if any(symbol.name.endswith("'") and symbol != FIRST_KV for symbol in free):
        return "element"
    if FIRST_KV in free or any(symbol.name.startswith(FOUND) for symbol in free):
        return "row"
    if Q in free:
        return "query" if any(part.has(Q) for part in expr.atoms(*COSTLY)) else "row"
    return "head" if free or expr.has(AppliedUndef) else "constant"


@dataclass(frozen=True)
class Value:
    """A variable of a printed function, or a member of the struct that it returns."""

    type: str
    name: str
    text: str
    about: str = ""


@dataclass
class Scope:
    """The values of one level, in the order in which they are computed."""

    prefix: str  # of its members, where an inner level reads them: "terms.", "query.", "row."
    values: dict[tuple[str, str], Value] = field(default_factory=dict)
    members: dict[str, Value] = field(default_factory=dict)

    def define(self, type: str, text: str, hint: str, about: str = "") -> str:
        """The name of a variable of that value, new or not."""
        if any(value.name == text for value in self.values.values()):
            return text
        if (type, text) not in self.values:
            taken = {value.name for value in self.values.values()}
            base, name, number = identifier(hint), identifier(hint), 1
            while name in taken:
                number += 1
                name = f"{base}{number}"
            self.values[type, text] = Value(type, name, text, about)
        return self.values[type, text].name

    def export(self, type: str, text: str, hint: str, about: str = "") -> str:
        """What an inner level calls that value."""
        if re.fullmatch(_EVERYWHERE, text):
            return text
        name = self.define(type, text, hint, about)
        self.members[name] = next(value for value in self.values.values() if value.name == name)
        return f"{self.prefix}{name}"


class Inlined(Scope):
    """A level without variables, of what is printed as one expression."""

    def define(self, type: str, text: str, hint: str, about: str = "") -> str:
        return bracketed(text)

    export = define


class Levels:
    """The scopes of the functions that a mask or a score prints, and the level that is being printed.

    `repeated` are the expressions that become variables, as a first printing has counted them.
    """

    def __init__(
        self,
        head: Scope,
        query: Scope,
        row: Scope,
        repeated: frozenset[tuple[sympy.Basic, Kind]] = frozenset(),
    ) -> None:
        self.scopes: dict[Level, Scope] = {"head": head, "query": query, "row": row, "element": Scope("")}
        self.at: Level = "element"
        self.repeated = repeated
        self.uses: Counter[tuple[sympy.Basic, Kind]] = Counter()
        self.printed: dict[tuple[sympy.Basic, Kind, Level], str] = {}

    def begin_function(self) -> Scope:
        """Another function of elements: its variables are its own."""
        self.scopes["element"] = Scope("")
        self.printed.clear()
        return self.scopes["element"]

    @contextmanager
    def inside(self, level: Level) -> Iterator[None]:
        """Print at `level` for a while."""
        before, self.at = self.at, level
        try:
            yield
        finally:
            self.at = before

    def outermost(self, level: Level) -> Level:
        """Of `level` and the one being printed: what an outer one computes cannot name an inner one's."""
        return min(level, self.at, key=LEVELS.index)

    def below(self, level: Level) -> bool:
        """Whether `level` is outside of the one that is being printed."""
        return LEVELS.index(level) < LEVELS.index(self.at)
