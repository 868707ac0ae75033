"""A mask or score as part of a kernel's name: the gallery's name for it where it has one, else a digest.

What counts is the mathematics, not the text: ``kv <= q`` is ``causal``.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from functools import lru_cache
from typing import Literal

import sympy
from sympy import Ge, Gt, Le, Lt, S
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from flashgen.spec.expression import Kind, Scope, read_expression
from flashgen.spec.functions import modulo
from flashgen.spec.gallery import GALLERY, Entry
from flashgen.spec.inputs import TensorInput
from flashgen.spec.printer import to_text
from flashgen.spec.symbols import MASK_VARIABLES, SCORE, SCORE_VARIABLES

_Shape = tuple[frozenset[tuple[str, int]], frozenset[sympy.Symbol]]


@lru_cache(maxsize=256)
def mask_label(condition: Boolean, inputs: tuple[TensorInput, ...]) -> str:
    """``causal``, ``window4096``, ``document``, or ``mask`` and eight hexadecimal digits."""
    return _named(condition, "mask", inputs) or f"mask{_digest(condition, inputs)}"


@lru_cache(maxsize=256)
def score_label(score: sympy.Expr, inputs: tuple[TensorInput, ...]) -> str:
    """``softcap50``, ``alibi``, or ``score`` and eight hexadecimal digits; empty for the score as it is."""
    if score == SCORE:
        return ""
    return _named(score, "score", inputs) or f"score{_digest(score, inputs)}"


def _digest(expr: sympy.Basic, inputs: tuple[TensorInput, ...]) -> str:
    return hashlib.sha256(f"{to_text(expr)} {inputs}".encode()).hexdigest()[:8]


def _named(expr: sympy.Basic, kind: Literal["mask", "score"], inputs: tuple[TensorInput, ...]) -> str | None:
    """The entry that an expression equals, tried with the constants and parameters that stand in it."""
    wanted = _ordered(expr)
    candidates = sorted(
        {abs(number) for number in _numbers(expr)} | (expr.free_symbols - set(SCORE_VARIABLES.values())),
        key=sympy.default_sort_key,
    )
    for entry in GALLERY.values():
        if entry.kind != kind or entry.formula == "score":
            continue
        placeholders, formula = _formula(entry, inputs)
        if _shape(formula, frozenset(placeholders)) != _shape(wanted, frozenset(candidates)):
            continue
        for values in itertools.product(candidates, repeat=len(placeholders)):
            if _ordered(formula.xreplace(dict(zip(placeholders, values, strict=True)))) == wanted:
                return _joined(entry.name, values)
    return None


def _numbers(expr: sympy.Basic) -> set[sympy.Rational]:
    """The numbers in an expression, their reciprocals, and what they may have been before ``+ 1``."""
    found: set[sympy.Rational] = set(expr.atoms(sympy.Rational))
    found |= {1 / number for number in found if number}
    return found | {number + 1 for number in found}


@lru_cache(maxsize=256)
def _formula(entry: Entry, inputs: tuple[TensorInput, ...]) -> tuple[tuple[sympy.Symbol, ...], sympy.Basic]:
    """An entry's formula in symbols for its parameters, read with the tensors that a spec declares."""
    placeholders = {
        parameter.name: sympy.Dummy(parameter.name, integer=True)
        if parameter.kind == "int"
        else sympy.Dummy(parameter.name, real=True)
        for parameter in entry.parameters
    }
    variables = MASK_VARIABLES if entry.kind == "mask" else SCORE_VARIABLES
    tensors = {tensor.name: tensor for tensor in (*entry.tensors, *inputs)}
    scope = Scope({**variables, **placeholders}, tensors=tensors, entries=GALLERY)
    expect = Kind.BOOLEAN if entry.kind == "mask" else Kind.REAL
    return tuple(placeholders.values()), _ordered(read_expression(entry.formula, scope, expect).expr)


def _ordered(expr: sympy.Basic) -> sympy.Basic:
    """Comparisons of integers all as ``a >= 0``, whichever way they were written."""

    def normal(relation: Relational) -> sympy.Basic:
        match relation:
            case Le(lhs=a, rhs=b) | Ge(lhs=b, rhs=a):
                difference = b - a
            case Lt(lhs=a, rhs=b) | Gt(lhs=b, rhs=a):
                difference = b - a - 1 if (b - a).is_integer else None
            case _:
                difference = None
        return relation if difference is None else Ge(sympy.expand(difference), S.Zero, evaluate=False)

    return expr.replace(lambda part: isinstance(part, Relational), normal)


def _shape(expr: sympy.Basic, free: frozenset[sympy.Basic]) -> _Shape:
    """What does not depend on the values of parameters: which functions and comparisons, of which symbols."""
    kept = (Relational, AppliedUndef, modulo, sympy.floor, sympy.Max, sympy.Min, sympy.Abs, sympy.tanh)
    names = Counter(type(part).__name__ for part in sympy.preorder_traversal(expr) if isinstance(part, kept))
    return frozenset(names.items()), frozenset(expr.free_symbols - free)


def _joined(name: str, values: tuple[sympy.Basic, ...]) -> str:
    parts = []
    for value in values:
        text = str(value) if value.is_Symbol or value.is_Integer else f"{float(value):g}"
        parts.append(text.replace(".", "p").replace("-", "m").replace("+", ""))
    joined = "_".join(parts)
    apart = "_" if joined and (name[-1].isdigit() or not joined[0].isdigit()) else ""
    return f"{name}{apart}{joined}"


__all__ = ["mask_label", "score_label"]
