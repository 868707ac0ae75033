"""What a score function or a condition costs for each element: in instructions, roughly as printed.

Parts that do not change along a row of keys are computed once a row and count nothing. An element of a sum
that is affine in kv costs one instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanFunction

from flashgen.spec.functions import COSTLY, modulo, sigmoid
from flashgen.spec.symbols import KV, SCORE, Q

DIVISION = 6  # of integers by a constant: a multiplication, shifts, a correction
DIVISION_BY_PARAMETER = 20
READ = 4  # of a tensor at the key's position: the address, the load, and waiting for some of it
REGISTERS_PER_READ = 17  # addresses and elements in flight
REGISTERS_PER_FUNCTION = 4
# Of a score, of a list of tiles, and of ends that read tensors, each: measured where 128x64 tiles of
# head_dim 128 spilled 8 to 88 bytes for sm_80, and 64x160 tiles of head_dim 64 still 16 with 4 (NVRTC 13.0).
ROW_REGISTERS = 8


@dataclass(frozen=True)
class Operations:
    """Of one element."""

    plain: float = 0.0  # on the pipes of fp32 and integers
    mufu: float = 0.0  # tanh, ex2, lg2, rcp
    registers: int = 0  # beside those of the kernel without it, of a thread

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.plain + other.plain, self.mufu + other.mufu, self.registers + other.registers)


NOTHING = Operations()


@lru_cache(maxsize=512)
def of_score(expr: sympy.Expr) -> Operations:
    """A score function's; nothing for `SCORE` itself, whose scale the softmax takes in."""
    if expr == SCORE:
        return NOTHING
    return _of((expr,)) + Operations(plain=1)  # the scale by itself


@lru_cache(maxsize=512)
def is_capped(expr: sympy.Expr) -> bool:
    """Whether a score is a * tanh(k * score) and no more, with a and k of the head, and rises with Q . K."""
    nodes = [node for node in expr.atoms(sympy.tanh) if node.has(SCORE)]
    if len(nodes) != 1:
        return False
    outer, inner = expr / nodes[0], nodes[0].args[0] / SCORE
    return (
        not (outer * inner).has(SCORE, KV, Q)
        and not outer.has(SCORE, KV, Q)
        and bool((outer * inner).is_positive)
    )


@lru_cache(maxsize=512)
def of_condition(condition: sympy.Basic) -> Operations:
    """A condition's that is tested element by element, and of putting -inf where it fails."""
    return _of((condition,)) + Operations(plain=1)


@lru_cache(maxsize=512)
def query_values(expr: sympy.Basic) -> int:
    """Parts that cost something and are the same for all keys: kernels keep them for each row."""
    if not expr.has(KV, SCORE):
        return int(any(part.has(Q) for part in expr.atoms(*COSTLY)))
    return sum(map(query_values, expr.args))


@lru_cache(maxsize=512)
def distance_parts(expr: sympy.Basic) -> tuple[sympy.Expr, ...]:
    """The largest parts that cost something for each element and depend on q and kv only through q - kv."""
    if not expr.has(KV, SCORE):
        return ()
    costly = any(node.has(KV) for node in expr.atoms(*COSTLY))
    if costly and isinstance(expr, sympy.Expr) and not expr.has(SCORE) and _of_distance(expr):
        return (expr,)
    return tuple(dict.fromkeys(part for arg in expr.args for part in distance_parts(arg)))


def _of_distance(expr: sympy.Expr) -> bool:
    if not expr.has(Q):
        return False
    compared = {test: test.func(test.lhs - test.rhs, 0) for test in expr.atoms(Relational)}
    moved = expr.xreplace(compared).xreplace({KV: Q - sympy.Dummy(integer=True)})
    return not moved.has(Q, KV)


def _of(roots: tuple[sympy.Basic, ...]) -> Operations:
    """Of every part that differs from element to element, each counted once."""
    pending, seen, found = list(roots), set(), NOTHING
    while pending:
        part = pending.pop()
        if part in seen or not part.has(KV, SCORE):
            continue
        seen.add(part)
        found += _of_node(part)
        if not _is_affine(part):
            pending += part.args
    return found


def _is_affine(part: sympy.Basic) -> bool:
    """A multiple of kv and something of the row: one instruction, whatever it is made of."""
    return isinstance(part, sympy.Add | sympy.Mul) and not part.has(SCORE) and not _curved(part)


def _curved(part: sympy.Basic) -> bool:
    products = [p for p in part.atoms(sympy.Mul) if sum(f.has(KV) for f in p.args) > 1]
    functions = part.atoms(sympy.Function, sympy.Piecewise, sympy.Pow)
    return bool(products) or any(function.has(KV) for function in functions)


def _of_node(part: sympy.Basic) -> Operations:
    varying = sum(arg.has(KV, SCORE) for arg in part.args)
    match part:
        case sympy.Symbol():
            return NOTHING
        case AppliedUndef():
            return Operations(plain=READ, registers=REGISTERS_PER_READ)
        case sympy.tanh() | sympy.exp() | sympy.log() | sigmoid():
            return Operations(plain=1, mufu=1, registers=REGISTERS_PER_FUNCTION)
        case sympy.Pow():
            return Operations(plain=1, mufu=0 if part.exp.is_Integer and part.exp > 0 else 1)
        case sympy.floor() | modulo() | sympy.Mod():
            divisor = part.args[1] if len(part.args) > 1 else sympy.fraction(part.args[0])[1]
            power = divisor.is_Integer and int(divisor) & (int(divisor) - 1) == 0
            return Operations(plain=1 if power else DIVISION if divisor.is_number else DIVISION_BY_PARAMETER)
        case sympy.Add() if _is_affine(part) or varying < len(part.args):
            return Operations(plain=varying)
        case sympy.Add() | sympy.Max() | sympy.Min() | BooleanFunction():
            return Operations(plain=max(varying - 1, 0) + (varying < len(part.args)))
        case sympy.Mul():
            # a factor of one part of a sum goes into its FMA
            return Operations(plain=max(varying - 1, 0) + 0.5 * (varying < len(part.args)))
        case sympy.Piecewise():
            return Operations(plain=len(part.args) - 1)
        case sympy.Tuple():
            return NOTHING
    return Operations(plain=1)


__all__ = [
    "NOTHING",
    "ROW_REGISTERS",
    "Operations",
    "distance_parts",
    "is_capped",
    "of_condition",
    "of_score",
    "query_values",
]
