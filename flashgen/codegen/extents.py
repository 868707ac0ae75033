"""How large the integers of masks and scores can get: what may leave 32 bits is printed in 64."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import sympy
from sympy import Expr
from sympy.core.function import AppliedUndef

from flashgen.codegen.levels import COLUMN, FIRST_KV, FOUND
from flashgen.spec.affine import is_whole
from flashgen.spec.functions import modulo
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.symbols import BATCH, HEAD, HEAD_KV, KV, SEQLEN_KV, SEQLEN_Q, Q

Extent = tuple[int, int]
"""Least and greatest value."""

POSITIONS = 2**26
"""Batch and lengths are below: one head of head_dim 64 would have 16 GiB of keys and values."""

HEADS = 2**16

SATURATED = 2**30
"""What `saturated` of ``templates/device/integer.cuh`` holds integers to: beyond all positions."""

_INT: Extent = (-(2**31), 2**31 - 1)
_ELEMENT: Extent = (-(2**31) + 1, 2**31 - 1)  # of an int32 tensor: one less than each is an int too
_KNOWN: dict[Expr, Extent] = {
    Q: (-POSITIONS, POSITIONS),
    KV: (0, POSITIONS),
    FIRST_KV: (0, POSITIONS),
    SEQLEN_Q: (0, POSITIONS),
    SEQLEN_KV: (0, POSITIONS),
    BATCH: (0, POSITIONS),
    HEAD: (0, HEADS),
    HEAD_KV: (0, HEADS),
    COLUMN: (-8, 2**9),  # -8: of the row above, on the same diagonal
}


class Extents:
    """Of the integers of one plan."""

    def __init__(self, parameters: tuple[RuntimeParameter, ...], tensors: tuple[TensorInput, ...]) -> None:
        least = {p.symbol: _INT[0] if p.least is None else p.least for p in parameters if p.kind == "int"}
        self._known = _KNOWN | {symbol: (value, _INT[1]) for symbol, value in least.items()}
        self._flags = {tensor.name for tensor in tensors if tensor.dtype == "bool"}

    def define(self, symbol: sympy.Symbol, expr: Expr) -> None:
        """`symbol` stands for `expr`."""
        self._known[symbol] = self.of(expr)

    def wide(self, expr: Expr) -> bool:
        """Whether the integer, or a sum or product on the way to it, may leave 32 bits."""
        least, greatest = self.of(expr)
        if expr.is_Add:
            least, greatest = _sum([(min(a, 0), max(b, 0)) for a, b in map(self.of, expr.args)])
        # C++ has no literal for the least int: it is the negative of a number of 64 bits.
        return least < _INT[0] + expr.is_Integer or greatest > _INT[1]

    def of(self, expr: Expr) -> Extent:
        """Of a whole expression."""
        if expr not in self._known:
            self._known[expr] = self._of(expr)
        return self._known[expr]

    def _of(self, expr: Expr) -> Extent:
        match expr:
            case sympy.Integer():
                return int(expr), int(expr)
            case sympy.Symbol():
                return (0, POSITIONS) if expr.name.startswith(FOUND) else _INT
            case AppliedUndef():
                return (0, 1) if str(expr.func) in self._flags else _ELEMENT
            case sympy.Add():
                return _sum(map(self.of, expr.args))
            case sympy.Mul() if all(map(is_whole, expr.args)):
                return reduce(_product, map(self.of, expr.args))
            case sympy.Pow() if expr.exp.is_Integer and expr.exp > 0:
                power = reduce(_product, [self.of(expr.base)] * int(expr.exp))
                return (0, power[1]) if expr.exp % 2 == 0 else power
            case sympy.floor():
                return self._quotient(expr.args[0])
            case modulo() | sympy.Mod():
                return self._remainder(*map(self.of, expr.args))
            case sympy.Min() | sympy.Max():
                choose = min if isinstance(expr, sympy.Min) else max
                extents = [self.of(arg) for arg in expr.args]
                return choose(a for a, _ in extents), choose(b for _, b in extents)
            case sympy.Abs():
                least, greatest = self.of(expr.args[0])
                return max(least, -greatest, 0), max(-least, greatest)
            case sympy.Piecewise():
                extents = [self.of(value) for value, _ in expr.args]
                return min(a for a, _ in extents), max(b for _, b in extents)
        return _INT

    def _quotient(self, quotient: Expr) -> Extent:
        numerator, denominator = sympy.fraction(sympy.together(quotient))
        if not (is_whole(numerator) and is_whole(denominator)):
            return -SATURATED, SATURATED  # of a real, whose conversion stops at 32 bits
        (a, b), (c, d) = self.of(numerator), self.of(denominator)
        if c > 0 or d < 0:
            values = [x // y for x in (a, b) for y in (c, d)]
            return min(values), max(values)
        return min(a, -b), max(b, -a)

    @staticmethod
    def _remainder(dividend: Extent, divisor: Extent) -> Extent:
        least, greatest = min(divisor[0] + 1, 0), max(divisor[1] - 1, 0)
        return (0, min(greatest, dividend[1])) if dividend[0] >= 0 and least == 0 else (least, greatest)


def _sum(extents: Iterable[Extent]) -> Extent:
    leasts, greatests = zip(*extents, strict=True)
    return sum(leasts), sum(greatests)


def _product(left: Extent, right: Extent) -> Extent:
    values = [a * b for a in left for b in right]
    return min(values), max(values)


__all__ = ["HEADS", "POSITIONS", "SATURATED", "Extents"]
