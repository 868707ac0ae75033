"""A mask or score as part of a kernel's name: the gallery's name for it where it has one, else a digest.

What counts is the mathematics before the text: ``kv <= q`` is ``causal``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import lru_cache
from typing import Literal

import sympy
from sympy import Ge, Gt, Le, Lt, S
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from flashgen.errors import SpecError
from flashgen.spec.expression import Kind, Scope, read_expression
from flashgen.spec.functions import modulo
from flashgen.spec.gallery import GALLERY, Entry
from flashgen.spec.inputs import TensorInput
from flashgen.spec.mathematics import Mathematics
from flashgen.spec.operations import NamedEntries
from flashgen.spec.printer import to_text
from flashgen.spec.symbols import MASK_VARIABLES, SCORE, SCORE_VARIABLES

_Kind = Literal["mask", "score"]
_Inputs = tuple[TensorInput, ...]
_Call = tuple[str, tuple[sympy.Expr, ...]]
_MOST_JOINED = 3  # entries in one label


@lru_cache(maxsize=256)
def mask_label(mathematics: Mathematics) -> str:
    """``causal``, ``window4096``, ``causal_and_document``, or ``mask`` and eight hexadecimal digits."""
    return _label("mask", mathematics.condition, mathematics.mask_named, mathematics.inputs)


@lru_cache(maxsize=256)
def score_label(mathematics: Mathematics) -> str:
    """``softcap50``, ``alibi``, or ``score`` and eight hexadecimal digits; empty for the score as it is."""
    if mathematics.score == SCORE:
        return ""
    return _label("score", mathematics.score, mathematics.score_named, mathematics.inputs)


def _label(kind: _Kind, expr: sympy.Basic, named: NamedEntries | None, inputs: _Inputs) -> str:
    if found := _found(expr, kind, inputs):
        return _written(*found)
    if named and len(named.calls) <= _MOST_JOINED:
        return f"_{named.operator}_".join(sorted({_written(*call) for call in named.calls}))
    return kind + hashlib.sha256(f"{to_text(expr)} {inputs}".encode()).hexdigest()[:8]


def _found(expr: sympy.Basic, kind: _Kind, inputs: _Inputs) -> _Call | None:
    """The entry of at most one parameter that an expression equals, the parameter being a part of it."""
    wanted = _ordered(expr)
    candidates = _numbers(expr) | _numbers(wanted) | (expr.free_symbols - set(SCORE_VARIABLES.values()))
    reads = {read.func.__name__ for read in expr.atoms(AppliedUndef)}
    for entry in GALLERY.values():
        if entry.kind != kind or len(entry.parameters) > 1 or entry.sink:
            continue
        if not reads.issuperset(tensor.name for tensor in entry.tensors):
            continue  # most, unread: reading a formula takes sympy tens of milliseconds
        try:
            formula, parameter = _formula(entry, inputs)
        except SpecError:
            continue  # what a spec declares by the name of the entry's tensor is of another form
        if _shape(formula) != _shape(wanted):
            continue
        if parameter is None:
            if formula == wanted:
                return entry.name, ()
            continue
        for value in sympy.ordered(candidates):
            if _ordered(formula.xreplace({parameter: value})) == wanted:
                return entry.name, (value,)
    return None


def _numbers(expr: sympy.Basic) -> set[sympy.Basic]:
    """What may have been a parameter: the expression's numbers, their reciprocals and negatives."""
    found: set[sympy.Basic] = set(expr.atoms(sympy.Rational))
    found |= {1 / number for number in found if number}
    return {abs(number) for number in found}


@lru_cache(maxsize=256)
def _formula(entry: Entry, inputs: _Inputs) -> tuple[sympy.Basic, sympy.Symbol | None]:
    """An entry's formula in a symbol for its parameter, read with the tensors as a spec declares them."""
    symbols = {
        parameter.name: sympy.Symbol(parameter.name, integer=True)
        if parameter.kind == "int"
        else sympy.Symbol(parameter.name, real=True)
        for parameter in entry.parameters
    }
    variables = MASK_VARIABLES if entry.kind == "mask" else SCORE_VARIABLES
    tensors = {tensor.name: tensor for tensor in (*entry.tensors, *inputs)}
    scope = Scope({**variables, **symbols}, tensors=tensors, entries=GALLERY)
    expect = Kind.BOOLEAN if entry.kind == "mask" else Kind.REAL
    formula = _ordered(read_expression(entry.formula, scope, expect).expr)
    return formula, next(iter(symbols.values()), None)


def _ordered(expr: sympy.Basic) -> sympy.Basic:
    """Comparisons of integers all as ``a >= 0``, whichever way they were written."""

    def normal(relation: Relational) -> sympy.Basic:
        match relation:
            case Le(lhs=a, rhs=b) | Ge(lhs=b, rhs=a):
                difference = b - a
            case Lt(lhs=a, rhs=b) | Gt(lhs=b, rhs=a) if (b - a).is_integer:
                difference = b - a - 1
            case _:
                return relation
        return Ge(difference, S.Zero, evaluate=False)

    return expr.replace(lambda part: isinstance(part, Relational), normal)


def _shape(expr: sympy.Basic) -> Counter[str]:
    """What does not depend on a parameter's value: which functions and comparisons there are."""
    kinds = (Relational, AppliedUndef, modulo, sympy.floor, sympy.Max, sympy.Min, sympy.Abs, sympy.tanh)
    return Counter(type(part).__name__ for part in sympy.preorder_traversal(expr) if isinstance(part, kinds))


def _written(name: str, arguments: tuple[sympy.Expr, ...]) -> str:
    parts = []
    for value in arguments:
        if value.is_Integer or value.is_Symbol:
            text = str(value)
        elif value.is_number:
            text = f"{float(value):g}"
        else:
            text = hashlib.sha256(to_text(value).encode()).hexdigest()[:8]
        parts.append(text.replace(".", "p").replace("-", "m").replace("+", ""))
    joined = "_".join(parts)
    apart = "_" if joined and not (name.isalpha() and joined[0].isdigit()) else ""
    return f"{name}{apart}{joined}"


__all__ = ["mask_label", "score_label"]
