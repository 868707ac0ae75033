"""The mathematics of an attention: mask and score, read and typed, and what they take.

Everything after the spec (tiles, code, interpreter, derivative) works on these expressions, not on the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import sympy
from sympy import Expr
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from flashgen.errors import SpecError
from flashgen.spec.expression import Kind, Reading, Scope, parse_expression, read_expression
from flashgen.spec.gallery import GALLERY
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.operations import NamedEntries
from flashgen.spec.symbols import MASK_VARIABLES, SCORE_VARIABLES, SEQLEN_KV, SEQLEN_Q, Q
from flashgen.spec.syntax import nowhere

Align = Literal["bottom_right", "top_left"]


@dataclass(frozen=True)
class DeclaredParameter:
    """A parameter as the spec declares it: a constant's text, or a number passed at call time.

    `runtime` is None for a constant; ``"any"`` is an integer where an expression needs one, else a float.
    """

    name: str
    constant: str | None = None
    runtime: Literal["int", "float", "any"] | None = None
    least: int | None = None

    def passed(self, *, integer: bool) -> RuntimeParameter:
        """What a call has to pass for it; integers are at least 1 where nothing else was said."""
        if not integer:
            return RuntimeParameter(self.name, "float")
        return RuntimeParameter(self.name, "int", 1 if self.least is None else self.least)


@dataclass(frozen=True)
class Context:
    """What a spec says that its mask and score may speak of."""

    head_dim: int
    align: Align = "bottom_right"
    parameters: tuple[DeclaredParameter, ...] = ()
    tensors: tuple[TensorInput, ...] = ()


@dataclass(frozen=True)
class Mathematics:
    """``O = softmax(score, where condition) V``, in the symbols of `flashgen.spec.symbols`.

    Constants are filled in. `inputs` and `runtime` are those that the expressions read, by name; `unread` the
    others that the texts speak of: they cancel. `sink`: an entry of the gallery asks for one. `mask_named`,
    `score_named`: the entries where a text is nothing else.
    """

    condition: Boolean
    score: Expr
    inputs: tuple[TensorInput, ...]
    runtime: tuple[RuntimeParameter, ...]
    unread: frozenset[str]
    sink: bool
    mask_named: NamedEntries | None
    score_named: NamedEntries | None


def read_mathematics(mask: str, score: str, context: Context) -> Mathematics:
    """Read both expressions.

    Raises:
        SpecError: what is wrong with the score (then its column counts in the score), else with the mask.
    """
    return _read(mask, score, context)


def read_mask(mask: str, context: Context) -> Boolean:
    """The mask's condition alone.

    Raises:
        SpecError: what is wrong with it.
    """
    return _mask(mask, context).expr


@lru_cache(maxsize=256)
def _mask(mask: str, context: Context) -> Reading:
    scope = _scope(context, MASK_VARIABLES, _parameters(context, frozenset(_undecided(context))))
    return read_expression(mask, scope, Kind.BOOLEAN)


@lru_cache(maxsize=256)
def _read(mask: str, score: str, context: Context) -> Mathematics:
    kept = _mask(mask, context)
    undecided = _undecided(context)
    decided = undecided & {symbol.name for symbol in kept.expr.free_symbols}
    tried = _score(score, context, undecided)  # all as integers, to see which have to be
    decided |= undecided & {symbol.name for symbol in tried.integers}
    scored = tried if decided == undecided else _score(score, context, decided)
    _check_score(scored.expr)

    tensors = {tensor.name: tensor for tensor in context.tensors}
    for name, tensor in [*kept.tensors.items(), *scored.tensors.items()]:
        if tensors.setdefault(name, tensor) != tensor:
            message = f"two named masks and scores read different tensors named '{name}'"
            raise SpecError(message, location=nowhere(0))
        if any(parameter.name == name for parameter in context.parameters):
            message = f"'{name}' names a parameter here, and a tensor of a named mask or score"
            raise SpecError(message, location=nowhere(0))
    read = {element.func.__name__ for part in (kept, scored) for element in part.expr.atoms(AppliedUndef)}
    symbols = kept.expr.free_symbols | scored.expr.free_symbols
    taken = read | {symbol.name for symbol in symbols}
    taken |= {parameter.name for parameter in context.parameters if not parameter.runtime}
    passed = (
        parameter.passed(integer=parameter.runtime == "int" or parameter.name in decided)
        for parameter in sorted(context.parameters, key=lambda parameter: parameter.name)
        if parameter.runtime
    )
    return Mathematics(
        condition=kept.expr,
        score=scored.expr,
        inputs=tuple(tensor for name, tensor in sorted(tensors.items()) if name in read),
        runtime=tuple(parameter for parameter in passed if parameter.symbol in symbols),
        unread=frozenset((kept.mentioned | scored.mentioned) - taken),
        sink=kept.sink or scored.sink,
        mask_named=kept.named,
        score_named=scored.named,
    )


def _score(score: str, context: Context, integers: frozenset[str]) -> Reading:
    return read_expression(score, _scope(context, SCORE_VARIABLES, _parameters(context, integers)), Kind.REAL)


def _check_score(score: Expr) -> None:
    if "score" not in {symbol.name for symbol in score.free_symbols}:
        raise SpecError(
            "the score leaves 'score' out: Q and K would have no part in it",
            location=nowhere(0),
            hint="score is scale * (Q . K); write score + bias[head, q, kv], say",
        )


def _undecided(context: Context) -> frozenset[str]:
    return frozenset(parameter.name for parameter in context.parameters if parameter.runtime == "any")


def _parameters(context: Context, integers: frozenset[str]) -> dict[str, Expr]:
    """Constants as numbers, the others as symbols: integers if declared so or named in `integers`."""
    return {
        parameter.name: (
            constant(parameter.constant)
            if parameter.constant is not None
            else parameter.passed(integer=parameter.runtime == "int" or parameter.name in integers).symbol
        )
        for parameter in context.parameters
    }


def constant(text: str) -> Expr:
    """The number that a constant parameter's text stands for.

    Raises:
        SpecError: it is not a number.
    """
    return parse_expression(text, names={}, expect=Kind.REAL)


def _scope(context: Context, variables: Mapping[str, Expr], parameters: Mapping[str, Expr]) -> Scope:
    offset = SEQLEN_KV - SEQLEN_Q if context.align == "bottom_right" else sympy.S.Zero
    row_and_size = {"q_index": Q - offset, "head_dim": sympy.Integer(context.head_dim)}
    tensors = {tensor.name: tensor for tensor in context.tensors}
    return Scope({**variables, **row_and_size}, parameters, tensors, GALLERY)


__all__ = [
    "Align",
    "Context",
    "DeclaredParameter",
    "Mathematics",
    "constant",
    "read_mask",
    "read_mathematics",
]
