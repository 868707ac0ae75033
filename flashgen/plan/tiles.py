"""Which tiles are visited and which need masking, from a mask's row bounds.

The one place where these decisions are made in Python: the interpreter, the I/O model and the cost model call
it, and the kernels print the same arithmetic (docs/architecture.md, "Tile ranges"). Positions are on the key
timeline: row i stands at ``i + seqlen_kv - seqlen_q`` for bottom_right and at ``i`` for top_left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sympy

from flashgen.spec.bounds import RowBounds
from flashgen.spec.symbols import SEQLEN_KV, SEQLEN_Q, Q

Align = Literal["bottom_right", "top_left"]
_Ints = npt.NDArray[np.int64]


def row_shift(align: Align, seqlen_q: int, seqlen_kv: int) -> int:
    """What is added to a row's index to get its position."""
    return seqlen_kv - seqlen_q if align == "bottom_right" else 0


def visited(bounds: RowBounds, q0: int, q1: int, seqlen_q: int, seqlen_kv: int, tile_kv: int) -> range:
    """Indices of the kv tiles that hold a kept element of the rows at positions q0..q1, both included.

    A superset by at most the tiles between two rows' intervals: exact for every mask whose rows overlap.
    """
    first, _ = bounds.evaluate(q0, seqlen_q, seqlen_kv)
    _, last = bounds.evaluate(q1, seqlen_q, seqlen_kv)
    return range(first // tile_kv, last // tile_kv + 1) if first <= last else range(0)


def needs_mask(
    bounds: RowBounds, tile: int, q0: int, q1: int, seqlen_q: int, seqlen_kv: int, tile_kv: int
) -> bool:
    """Whether some element of kv tile `tile` is dropped for some row at positions q0..q1.

    True also for a tile that passes the end of the keys.
    """
    first, _ = bounds.evaluate(q1, seqlen_q, seqlen_kv)
    _, last = bounds.evaluate(q0, seqlen_q, seqlen_kv)
    return not (first <= tile * tile_kv and (tile + 1) * tile_kv - 1 <= last)


@dataclass(frozen=True)
class TileCounts:
    """What one (batch, head) costs. Counted exactly, in numpy."""

    per_q_tile: tuple[int, ...]  # kv tiles visited by each q tile, first rows first
    masked: int  # of them all, those that need masking
    kv_rows: int  # rows of K (and of V) that are loaded; the last tile's missing rows are not
    kept: int  # (q, kv) pairs that the mask keeps

    @property
    def visited(self) -> int:
        return sum(self.per_q_tile)

    @property
    def q_tiles(self) -> int:
        return len(self.per_q_tile)


@lru_cache(maxsize=4096)
def count(
    bounds: RowBounds, align: Align, seqlen_q: int, seqlen_kv: int, tile_q: int, tile_kv: int
) -> TileCounts:
    """Visited and masked tiles, loaded rows and kept pairs of one (batch, head).

    A few milliseconds for 64K x 64K: arrays are as long as the number of q tiles (rows, for the pairs).
    """
    if seqlen_q == 0 or seqlen_kv == 0:
        return TileCounts((0,) * -(-seqlen_q // tile_q), 0, 0, 0)
    shift = row_shift(align, seqlen_q, seqlen_kv)
    start = np.arange(0, seqlen_q, tile_q, dtype=np.int64)
    first_q0, last_q0 = _rows(bounds, start + shift, seqlen_q, seqlen_kv)
    first_q1, last_q1 = _rows(bounds, np.minimum(start + tile_q, seqlen_q) - 1 + shift, seqlen_q, seqlen_kv)
    some = first_q0 <= last_q1
    low, high = first_q0 // tile_kv, last_q1 // tile_kv
    per_q_tile = np.where(some, high - low + 1, 0)
    # whole tiles inside every row's interval, cut to those visited
    whole = np.minimum((last_q0 + 1) // tile_kv - 1, high) - np.maximum(-(-first_q1 // tile_kv), low) + 1
    masked = per_q_tile - np.where(some, np.maximum(whole, 0), 0)
    loaded = np.where(some, np.minimum((high + 1) * tile_kv, seqlen_kv) - low * tile_kv, 0)
    return TileCounts(
        per_q_tile=tuple(per_q_tile.tolist()),
        masked=int(masked.sum()),
        kv_rows=int(loaded.sum()),
        kept=_kept(bounds, shift, seqlen_q, seqlen_kv),
    )


@lru_cache(maxsize=256)
def _kept(bounds: RowBounds, shift: int, seqlen_q: int, seqlen_kv: int) -> int:
    rows = np.arange(seqlen_q, dtype=np.int64) + shift
    first, last = _rows(bounds, rows, seqlen_q, seqlen_kv)
    return int(np.maximum(last - first + 1, 0).sum())


def _rows(bounds: RowBounds, q: _Ints, seqlen_q: int, seqlen_kv: int) -> tuple[_Ints, _Ints]:
    """`RowBounds.evaluate` over an array of rows, clamped in the same way."""
    values = {Q: q, SEQLEN_Q: np.int64(seqlen_q), SEQLEN_KV: np.int64(seqlen_kv)}
    first = np.zeros_like(q) if bounds.first is None else _array(bounds.first, values)
    last = np.full_like(q, seqlen_kv - 1) if bounds.last is None else _array(bounds.last, values)
    first, last = np.broadcast_to(first, q.shape), np.broadcast_to(last, q.shape)
    return np.clip(first, 0, seqlen_kv), np.clip(last, -1, seqlen_kv - 1)


def _array(expr: sympy.Expr, values: dict[sympy.Symbol, Any]) -> Any:
    """An integer-valued bound on int64 arrays; exact, since a floor's fraction is divided out in integers."""
    if isinstance(expr, sympy.Symbol):
        return values[expr]
    if isinstance(expr, sympy.Integer):
        return np.int64(int(expr))
    if isinstance(expr, sympy.floor):
        numerator, denominator = sympy.fraction(sympy.together(expr.args[0]))
        return _array(numerator, values) // _array(denominator, values)
    operation = _OPERATIONS.get(expr.func)
    if operation is None:
        raise TypeError(f"no integer array form of {expr}")
    result = _array(expr.args[0], values)
    for arg in expr.args[1:]:
        result = operation(result, _array(arg, values))
    return result


_OPERATIONS = {sympy.Add: np.add, sympy.Mul: np.multiply, sympy.Max: np.maximum, sympy.Min: np.minimum}
