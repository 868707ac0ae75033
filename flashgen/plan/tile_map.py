"""Tiles of a condition that is looked at element by element, in numpy.

Every element is looked at once, in blocks that tiles are put together from. Of large problems only bands of
rows are looked at, spread over the whole, and what lies between them is interpolated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from flashgen.plan.tiles import Ends, Ints, TileClass, TileCounts

Bits = npt.NDArray[np.uint8]
Keep = Callable[[slice, Ints], npt.NDArray[np.bool_]]
"""Rows by number, and positions of keys -> what is kept: broadcastable to [rows, keys]."""

BLOCK = 16  # rows and keys that the tiles of kernels are multiples of
BAND_ROWS = 256
ELEMENTS = 1 << 26  # that are looked at in all, about
AT_A_TIME = 1 << 24  # of them: numpy holds several integers of 8 bytes for each


@dataclass(frozen=True, eq=False)
class Band:
    """Rows next to each other, in blocks; packed, eight blocks of keys to a byte, since many are kept."""

    rows: range
    some: Bits  # [blocks of rows, blocks of keys]: whether it holds a kept element
    every: Bits  # whether all of it is kept
    kept: int


@dataclass(frozen=True, eq=False)
class Blocks:
    """A condition over [seqlen_q, seqlen_kv], in blocks of `rows` and `keys`; `bands` may leave rows out."""

    seqlen_q: int
    seqlen_kv: int
    rows: int
    keys: int
    bands: tuple[Band, ...]

    def classes(self, tile_q: int, tile_kv: int) -> Bits:
        """The `TileClass` of each tile, [q tiles, kv tiles]; of rows left out, that of the nearest others."""
        q_tiles = -(-self.seqlen_q // tile_q)
        found, places = self._seen(tile_q, tile_kv)
        nearest = np.abs(np.arange(q_tiles)[:, None] - places).argmin(axis=1) if q_tiles else []
        return found[nearest]

    def count(self, tile_q: int, tile_kv: int) -> TileCounts:
        """Tiles, rows and pairs."""
        q_tiles = -(-self.seqlen_q // tile_q)
        if q_tiles == 0 or self.seqlen_kv == 0:
            return TileCounts((0,) * q_tiles, 0, 0, 0)
        found, places = self._seen(tile_q, tile_kv)
        partial, visited = found == TileClass.PARTIAL, found != TileClass.SKIPPED
        per_q_tile, masked, last = (
            np.rint(np.interp(np.arange(q_tiles), places, each)).astype(int)
            for each in (visited.sum(axis=1), partial.sum(axis=1), visited[:, -1])
        )
        seen = sum(len(band.rows) for band in self.bands)
        return TileCounts(
            per_q_tile=tuple(per_q_tile.tolist()),
            masked=int(masked.sum()),
            kv_rows=int(per_q_tile.sum() * tile_kv - last.sum() * (-self.seqlen_kv % tile_kv)),
            kept=sum(band.kept for band in self.bands) * self.seqlen_q // seen,
        )

    def _seen(self, tile_q: int, tile_kv: int) -> tuple[Bits, npt.NDArray[np.float64]]:
        """Classes of the tiles in bands, and where each stands among the q tiles."""
        sizes = tile_q // self.rows, tile_kv // self.keys
        found, places = [], []
        for band in self.bands:
            some, every = (
                np.unpackbits(bits, axis=1, count=-(-self.seqlen_kv // self.keys))
                for bits in (band.some, band.every)
            )
            some = _in_blocks(np.bitwise_or, some, *sizes)
            every = _in_blocks(np.bitwise_and, every, *sizes)
            if self.seqlen_kv % tile_kv:
                every[:, -1:] = 0  # the last tile passes the end of the keys
            kept = np.where(every, TileClass.FULL, TileClass.PARTIAL)
            found.append(np.where(some, kept, TileClass.SKIPPED).astype(np.uint8))
            places.append(band.rows.start / tile_q + np.arange(len(some)))
        return np.concatenate(found), np.concatenate(places)


def look(keep: Keep, ends: Ends, seqlen_kv: int, tile_q: int, tile_kv: int) -> Blocks:
    """The elements that `keep` keeps, within the interval of each row; in blocks that the tile is made of."""
    first, last = ends
    seqlen_q = len(first)
    rows, keys = gcd(tile_q, BLOCK), gcd(tile_kv, BLOCK)
    width = np.maximum(last - first + 1, 0)
    if width.sum() <= ELEMENTS or seqlen_q <= BAND_ROWS:
        spans = [range(seqlen_q)]
    else:
        bands = max(2, int(ELEMENTS / (width.mean() * BAND_ROWS)))
        starts = np.linspace(0, seqlen_q - BAND_ROWS, bands).astype(int) // BAND_ROWS * BAND_ROWS
        spans = [range(start, start + BAND_ROWS) for start in sorted(set(starts.tolist()))]
    found = tuple(_band(keep, ends, seqlen_kv, span, rows, keys) for span in spans)
    return Blocks(seqlen_q, seqlen_kv, rows, keys, found)


def _band(keep: Keep, ends: Ends, seqlen_kv: int, span: range, rows: int, keys: int) -> Band:
    first, last = ends
    some = np.zeros((-(-len(span) // rows), -(-seqlen_kv // keys)), dtype=np.uint8)
    every = np.zeros_like(some)
    kept = 0
    step = max(rows, min(BAND_ROWS, AT_A_TIME // max(seqlen_kv, 1)) // rows * rows)  # whole blocks
    for start in range(span.start, span.stop, step):
        part = slice(start, min(start + step, span.stop))
        low = int(first[part].min()) // keys * keys
        high = min(-(-(int(last[part].max()) + 1) // keys) * keys, seqlen_kv)
        if low >= high:
            continue
        kv = np.arange(low, high)
        inside = (first[part, None] <= kv) & (kv <= last[part, None])
        bits = (inside & keep(part, kv)).view(np.uint8)
        kept += int(bits.sum())
        at = slice((part.start - span.start) // rows, -(-(part.stop - span.start) // rows))
        columns = slice(low // keys, -(-high // keys))
        some[at, columns] = _in_blocks(np.bitwise_or, bits, rows, keys)
        every[at, columns] = _in_blocks(np.bitwise_and, bits, rows, keys)
    return Band(span, np.packbits(some, axis=1), np.packbits(every, axis=1), kept)


def _in_blocks(operation: np.ufunc, bits: Bits, rows: int, columns: int) -> Bits:
    """The operation over blocks of a matrix, the last ones ragged."""
    if 0 in bits.shape:
        return np.zeros((-(-bits.shape[0] // rows), -(-bits.shape[1] // columns)), dtype=np.uint8)
    whole = len(bits) // rows * rows  # which reduceat would take 50 times as long for
    by_rows = operation.reduce(bits[:whole].reshape(-1, rows, bits.shape[1]), axis=1)
    if whole < len(bits):
        by_rows = np.concatenate([by_rows, operation.reduce(bits[whole:], axis=0, keepdims=True)])
    return np.asarray(operation.reduceat(by_rows, np.arange(0, bits.shape[1], columns), axis=1))


__all__ = ["Band", "Bits", "Blocks", "Keep", "look"]
