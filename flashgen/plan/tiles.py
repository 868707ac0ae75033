"""Which tiles are visited and which need masking, from the intervals of keys that rows keep.

The one place where these decisions are made in Python: the interpreter, the I/O model and the cost model call
it, and the kernels print the same arithmetic (docs/architecture.md, "Tile ranges"). Positions are on the key
timeline: row i stands at ``i + seqlen_kv - seqlen_q`` for bottom_right and at ``i`` for top_left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flashgen.spec.bounds import RowBounds
from flashgen.spec.evaluation import evaluate

Align = Literal["bottom_right", "top_left"]
Ints = npt.NDArray[np.int64]
Ends = tuple[Ints, Ints]
"""First and last key of each row in one segment, clamped as `RowBounds.evaluate` does."""


class TileClass(IntEnum):
    """What a q tile has to do with a kv tile."""

    SKIPPED = 0
    FULL = 1  # visited without masking
    PARTIAL = 2  # visited and masked


def row_shift(align: Align, seqlen_q: int, seqlen_kv: int) -> int:
    """What is added to a row's index to get its position."""
    return seqlen_kv - seqlen_q if align == "bottom_right" else 0


def visits(ends: Sequence[Sequence[int]], tile_kv: int) -> list[tuple[int, bool]]:
    """The kv tiles that rows q0 to q1 visit, ascending, none twice, and whether each is masked.

    `ends` has for each segment ``first(q0), last(q0), first(q1), last(q1)``, clamped as `RowBounds.evaluate`
    does. A tile is visited where it meets the span from first(q0) to last(q1) of some segment: a superset of
    the tiles with a kept element, by at most those between two rows' intervals. It goes unmasked where one
    segment holds all of it for both rows, and so for all between them.
    """
    masked: dict[int, bool] = {}
    for first_q0, last_q0, first_q1, last_q1 in ends:
        if first_q0 > last_q1:
            continue
        for tile in range(first_q0 // tile_kv, last_q1 // tile_kv + 1):
            whole = first_q1 <= tile * tile_kv and (tile + 1) * tile_kv - 1 <= last_q0
            masked[tile] = masked.get(tile, True) and not whole
    return sorted(masked.items())


@dataclass(frozen=True)
class TileCounts:
    """What one (batch, head) costs."""

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


def row_ends(
    segment: RowBounds, rows: Ints, seqlen_q: int, seqlen_kv: int, values: Mapping[str, Any]
) -> Ends:
    """`RowBounds.evaluate` for rows at many positions at once, clamped in the same way."""
    known = {"q": rows, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv, **values}
    first = 0 if segment.first is None else evaluate(segment.first, known)
    last = seqlen_kv - 1 if segment.last is None else evaluate(segment.last, known)
    return (
        np.clip(np.broadcast_to(first, rows.shape), 0, seqlen_kv),
        np.clip(np.broadcast_to(last, rows.shape), -1, seqlen_kv - 1),
    )


def count(segments: Sequence[Ends], seqlen_kv: int, tile_q: int, tile_kv: int) -> TileCounts:
    """Exact counts from the ends of every row: a few milliseconds for 64K x 64K."""
    rows = len(segments[0][0])
    if rows == 0 or seqlen_kv == 0:
        return TileCounts((0,) * -(-rows // tile_q), 0, 0, 0)
    spans, wholes, last_visited = [], [], np.zeros(-(-rows // tile_q), dtype=bool)
    for (low, high), whole in (_tile_spans(ends, tile_q, tile_kv) for ends in segments):
        spans.append((low, high))
        wholes.append(whole)
        last_visited |= (low <= high) & (high == (seqlen_kv - 1) // tile_kv)
    per_q_tile, full = _in_union(spans), _in_union(wholes)
    missing = -seqlen_kv % tile_kv
    return TileCounts(
        per_q_tile=tuple(per_q_tile.tolist()),
        masked=int(per_q_tile.sum() - full.sum()),
        kv_rows=int(per_q_tile.sum() * tile_kv - last_visited.sum() * missing),
        kept=int(_in_union(segments).sum()),
    )


def classes(segments: Sequence[Ends], seqlen_kv: int, tile_q: int, tile_kv: int) -> npt.NDArray[np.uint8]:
    """The `TileClass` of each tile: [q tiles, kv tiles]."""
    q_tiles = -(-len(segments[0][0]) // tile_q)
    tiles = np.arange(-(-seqlen_kv // tile_kv))
    found = np.full((q_tiles, len(tiles)), TileClass.SKIPPED, dtype=np.uint8)
    spans = [_tile_spans(ends, tile_q, tile_kv) for ends in segments] if q_tiles and len(tiles) else []
    for chosen, what in ((0, TileClass.PARTIAL), (1, TileClass.FULL)):
        for pair in spans:
            low, high = pair[chosen]
            found[(low[:, None] <= tiles) & (tiles <= high[:, None])] = what
    return found


def _tile_spans(ends: Ends, tile_q: int, tile_kv: int) -> tuple[Ends, Ends]:
    """For each q tile, first and last kv tile of those that one segment visits, and of those it fills."""
    first, last = ends
    q0 = np.arange(0, len(first), tile_q)
    q1 = np.minimum(q0 + tile_q, len(first)) - 1
    some = first[q0] <= last[q1]
    low, high = np.where(some, first[q0] // tile_kv, 0), np.where(some, last[q1] // tile_kv, -1)
    whole = np.maximum(-(-first[q1] // tile_kv), low), np.minimum((last[q0] + 1) // tile_kv - 1, high)
    return (low, high), whole


def _in_union(intervals: Sequence[Ends]) -> Ints:
    """How many integers the union of the intervals holds, row by row."""
    low = np.stack([interval[0] for interval in intervals])
    high = np.stack([interval[1] for interval in intervals])
    low, high = np.where(low <= high, low, 0), np.where(low <= high, high, -1)
    order = np.argsort(low, axis=0, kind="stable")
    low, high = np.take_along_axis(low, order, axis=0), np.take_along_axis(high, order, axis=0)
    total = np.zeros(low.shape[1], dtype=np.int64)
    done = np.zeros(low.shape[1], dtype=np.int64)  # all below are counted
    for begin, end in zip(low, high, strict=True):
        total += np.maximum(end - np.maximum(begin, done) + 1, 0)
        done = np.maximum(done, end + 1)
    return total


__all__ = [
    "Align", "Ends", "Ints", "TileClass", "TileCounts", "classes", "count", "row_ends", "row_shift", "visits",
]  # fmt: skip
