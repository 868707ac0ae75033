"""How much of the scores a mask keeps, tile by tile, for one workload: exactly, or as far as it is known.

The ends of intervals are evaluated row by row; for the route `map`, the condition element by element, as the
preparation kernel does it on the GPU. What a call passes is not known to a plan: tensors of the gallery are
taken from its samples, and what hangs on anything else is left open.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import gcd
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sympy
from sympy import And, Max, Min
from sympy.core.function import AppliedUndef

from flashgen.plan import tiles
from flashgen.plan.model import MaskPlan
from flashgen.plan.tile_map import BLOCK, Bits, Blocks, look
from flashgen.plan.tiles import Align, Ends, Ints, TileClass, TileCounts, row_ends, row_shift
from flashgen.spec.bounds import RowBounds
from flashgen.spec.evaluation import evaluate
from flashgen.spec.inputs import TensorInput
from flashgen.spec.sample import sample_tensor

Basis = Literal["exact", "sample", "hull"]

REPRESENTATIVES = 4  # of the batches, and of the heads, that a mask tells apart
_LOOKED_AT = 2 * REPRESENTATIVES**2  # all that the tilings of a workload ask for, each of them again


@dataclass(frozen=True)
class Coverage:
    """A mask over the scores of one workload. `tensors` are those that the mask may read."""

    mask: MaskPlan
    align: Align
    seqlen_q: int
    seqlen_kv: int
    batch: int = 1
    heads_q: int = 1
    heads_kv: int = 1
    tensors: tuple[TensorInput, ...] = ()

    @property
    def basis(self) -> Basis:
        """What counts rest on: the mask alone, the gallery's samples of its tensors beside it, or a hull.

        In a hull, what hangs on unknown tensors and parameters is taken to keep all, and no tile is full.
        """
        condition = self.mask.condition
        if not _is_known(condition, {*self.values(0, 0), "q", "kv"}):
            return "hull"
        return "sample" if condition.atoms(AppliedUndef) else "exact"

    def count(self, tile_q: int, tile_kv: int) -> TileCounts:
        """Tiles, rows and pairs of one (batch, head): the mean over some where the mask tells them apart.

        What is rounded to whole tiles are sums over q tiles, so that none is off by more than half a tile.
        """
        return _mean_count(self, tile_q, tile_kv)

    def mean_tiles(self, tile_q: int, tile_kv: int) -> tuple[Fraction, Fraction]:
        """Tiles that one (batch, head) visits, and those of them that it masks: the mean, unrounded."""
        each = _count_each(self, tile_q, tile_kv)
        visited, masked = (sum(getattr(counts, name) for counts in each) for name in ("visited", "masked"))
        return Fraction(visited, len(each)), Fraction(masked, len(each))

    def count_of(self, batch: int, head: int, tile_q: int, tile_kv: int) -> TileCounts:
        """Tiles, rows and pairs of one (batch, head)."""
        if self.mask.derivation.route == "map":
            counts = self._blocks(batch, head, tile_q, tile_kv).count(tile_q, tile_kv)
        else:
            counts = tiles.count(self.ends(batch, head), self.seqlen_kv, tile_q, tile_kv)
        masked = counts.visited if self.basis == "hull" else counts.masked
        return TileCounts(counts.per_q_tile, masked, counts.kv_rows, counts.kept)

    def classes(self, batch: int, head: int, tile_q: int, tile_kv: int) -> Bits:
        """The `TileClass` of each tile: [q tiles, kv tiles]."""
        if self.mask.derivation.route == "map":
            found = self._blocks(batch, head, tile_q, tile_kv).classes(tile_q, tile_kv)
        else:
            found = tiles.classes(self.ends(batch, head), self.seqlen_kv, tile_q, tile_kv)
        if self.basis == "hull":
            found[found == TileClass.FULL] = TileClass.PARTIAL
        return found

    def representatives(self) -> list[tuple[int, int]]:
        """Some of the (batch, head) that the mask tells apart."""
        over = self.mask.derivation.over
        batches = _spread(self.batch) if "batch" in over else [0]
        heads = _spread(self.heads_q) if "head" in over else [0]
        return list(product(batches, heads))

    def ends(self, batch: int, head: int) -> tuple[Ends, ...]:
        """First and last key of every row, segment by segment."""
        return _ends(self, batch, head)

    def values(self, batch: int, head: int) -> dict[str, Any]:
        """By name, all that is known of what the mask reads, but for `q` and `kv`."""
        shift = row_shift(self.align, self.seqlen_q, self.seqlen_kv)
        origins: dict[str | int, int] = {"q": shift, "q - kv": shift - (self.seqlen_kv - 1)}
        known: dict[str, Any] = {
            "batch": batch,
            "head": head,
            "head_kv": head * self.heads_kv // self.heads_q,
            "seqlen_q": self.seqlen_q,
            "seqlen_kv": self.seqlen_kv,
        }
        read = {element.func.__name__ for element in self.mask.condition.atoms(AppliedUndef)}
        for tensor in self.tensors:
            sample = _sample(tensor, self) if tensor.name in read else None
            if sample is not None:
                known[tensor.name] = _reader(sample, tuple(origins.get(axis, 0) for axis in tensor.index))
        return known

    def positions(self) -> Ints:
        """Of the rows, on the key timeline."""
        return np.arange(self.seqlen_q, dtype=np.int64) + row_shift(self.align, self.seqlen_q, self.seqlen_kv)

    def _blocks(self, batch: int, head: int, tile_q: int, tile_kv: int) -> Blocks:
        return _looked_at(self, batch, head, gcd(tile_q, BLOCK), gcd(tile_kv, BLOCK))


@lru_cache(maxsize=4096)
def _mean_count(coverage: Coverage, tile_q: int, tile_kv: int) -> TileCounts:
    each = _count_each(coverage, tile_q, tile_kv)
    if len(each) == 1:
        return each[0]

    def mean(total: Any) -> Any:  # rounded alike wherever it is taken, so that a part stays below its whole
        return (2 * total + len(each)) // (2 * len(each))

    up_to_here = mean(np.cumsum(np.sum([counts.per_q_tile for counts in each], axis=0)))
    masked, kv_rows, kept = (
        mean(sum(getattr(counts, name) for counts in each)) for name in ("masked", "kv_rows", "kept")
    )
    return TileCounts(tuple(np.diff(up_to_here, prepend=0).tolist()), masked, kv_rows, kept)


def _count_each(coverage: Coverage, tile_q: int, tile_kv: int) -> list[TileCounts]:
    return [coverage.count_of(*which, tile_q, tile_kv) for which in coverage.representatives()]


@lru_cache(maxsize=64)
def _ends(coverage: Coverage, batch: int, head: int) -> tuple[Ends, ...]:
    derived, rows = coverage.mask.derivation, coverage.positions()
    known = coverage.values(batch, head) | {"q": rows}
    segments = derived.segments
    if derived.ranges is not None:
        segments = (derived.ranges.bounds,)
        for search in derived.ranges.searches:
            if _is_known(search.read, {*known, "kv"}) and _is_known(search.value, known):
                keys = evaluate(search.read, known | {"kv": np.arange(coverage.seqlen_kv)})
                wanted = np.broadcast_to(evaluate(search.value, known), rows.shape)
                side: Literal["left", "right"] = "left" if search.relation == ">=" else "right"
                known[search.result.name] = np.searchsorted(keys, wanted, side)
    lengths = coverage.seqlen_q, coverage.seqlen_kv
    return tuple(row_ends(_known_part(segment, known), rows, *lengths, known) for segment in segments)


@lru_cache(maxsize=_LOOKED_AT)
def _looked_at(coverage: Coverage, batch: int, head: int, step_q: int, step_kv: int) -> Blocks:
    known, rows = coverage.values(batch, head), coverage.positions()
    parts = And.make_args(coverage.mask.derivation.residual)
    residual = And(*[part for part in parts if _is_known(part, {*known, "q", "kv"})])

    def keep(part: slice, kv: Ints) -> Any:
        return evaluate(residual, known | {"q": rows[part, None], "kv": kv})

    (hull,) = coverage.ends(batch, head)
    return look(keep, hull, coverage.seqlen_kv, step_q, step_kv)


@lru_cache(maxsize=64)
def _sample(tensor: TensorInput, coverage: Coverage) -> npt.NDArray[Any] | None:
    return sample_tensor(
        tensor,
        batch=coverage.batch,
        heads_q=coverage.heads_q,
        heads_kv=coverage.heads_kv,
        seqlen_q=coverage.seqlen_q,
        seqlen_kv=coverage.seqlen_kv,
    )


def _reader(array: npt.NDArray[Any], origin: tuple[int, ...]) -> Any:
    """A tensor's elements by position; outside of an axis, the nearest."""

    def read(*subscripts: Any) -> Any:
        places = (
            np.clip(subscript - first, 0, length - 1)
            for subscript, first, length in zip(subscripts, origin, array.shape, strict=True)
        )
        return array[tuple(places)]

    return read


def _spread(length: int) -> list[int]:
    return sorted({int(place) for place in np.linspace(0, length - 1, min(length, REPRESENTATIVES))})


def _is_known(expr: sympy.Basic, names: Collection[str]) -> bool:
    reads = {read.func.__name__ for read in expr.atoms(AppliedUndef)}
    return ({symbol.name for symbol in expr.free_symbols} | reads) <= set(names)


def _known_part(bounds: RowBounds, names: Collection[str]) -> RowBounds:
    """An interval around the bounds, of those of their parts that are known."""
    firsts = [] if bounds.first is None else [e for e in Max.make_args(bounds.first) if _is_known(e, names)]
    lasts = [] if bounds.last is None else [e for e in Min.make_args(bounds.last) if _is_known(e, names)]
    return RowBounds(Max(*firsts) if firsts else None, Min(*lasts) if lasts else None)


__all__ = ["Basis", "Coverage"]
