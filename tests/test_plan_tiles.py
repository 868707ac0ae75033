"""Tile ranges and counts against the elementwise truth."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgen.plan import tiles
from flashgen.spec.bounds import RowBounds
from flashgen.spec.symbols import SEQLEN_KV, SEQLEN_Q, Q

BOUNDS = {
    "full": RowBounds(None, None),
    "causal": RowBounds(None, Q),
    "window": RowBounds(sympy.Max(0, Q - 6), Q),
    "lookahead": RowBounds(Q - 3, Q + 5),
    "chunked": RowBounds(8 * sympy.floor(Q / 8), Q),
    "uneven": RowBounds(sympy.floor((2 * Q + 1) / 3), sympy.Min(Q + 2, SEQLEN_KV - 2)),
    "prefix": RowBounds(None, sympy.Max(Q, 9)),
    "lengths": RowBounds(None, Q + SEQLEN_Q - 4),
    "past the end": RowBounds(Q + 40, Q + 60),
}


def truth(bounds: RowBounds, align: Any, seqlen_q: int, seqlen_kv: int) -> np.ndarray:
    """Kept pairs, [seqlen_q, seqlen_kv], by substitution into the expressions."""
    kept = np.zeros((seqlen_q, seqlen_kv), dtype=bool)
    for i in range(seqlen_q):
        q = i + tiles.row_shift(align, seqlen_q, seqlen_kv)
        first, last = bounds.evaluate(q, seqlen_q, seqlen_kv)
        kept[i, max(first, 0) : last + 1] = True
    return kept


@settings(max_examples=150, deadline=None)
@given(
    mask=st.sampled_from(sorted(BOUNDS)),
    align=st.sampled_from(["bottom_right", "top_left"]),
    seqlen_q=st.integers(0, 40),
    seqlen_kv=st.integers(0, 40),
    tile_q=st.sampled_from([1, 4, 7, 16]),
    tile_kv=st.sampled_from([1, 4, 5, 16]),
)
def test_no_kept_element_is_skipped_and_no_partial_tile_called_full(
    mask: str,
    align: Literal["bottom_right", "top_left"],
    seqlen_q: int,
    seqlen_kv: int,
    tile_q: int,
    tile_kv: int,
) -> None:
    bounds = BOUNDS[mask]
    kept = truth(bounds, align, seqlen_q, seqlen_kv)
    shift = tiles.row_shift(align, seqlen_q, seqlen_kv)
    per_q_tile, masked, kv_rows = [], 0, 0
    for start in range(0, seqlen_q, tile_q):
        stop = min(start + tile_q, seqlen_q)
        where = (start + shift, stop - 1 + shift)
        seen = tiles.visited(bounds, *where, seqlen_q, seqlen_kv, tile_kv)
        per_q_tile.append(len(seen))
        for j in range(-(-seqlen_kv // tile_kv)):
            block = kept[start:stop, j * tile_kv : (j + 1) * tile_kv]
            if j in seen:
                kv_rows += block.shape[1]
                whole = bool(block.all()) and block.shape[1] == tile_kv
                needs = tiles.needs_mask(bounds, j, *where, seqlen_q, seqlen_kv, tile_kv)
                assert needs == (not whole)
                masked += needs
            else:
                assert not block.any()
    counts = tiles.count(bounds, align, seqlen_q, seqlen_kv, tile_q, tile_kv)
    assert counts == tiles.TileCounts(tuple(per_q_tile), masked, kv_rows, int(kept.sum()))


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_no_empty_tile_is_visited(mask: str) -> None:
    kept = truth(BOUNDS[mask], "bottom_right", 37, 53)
    for start in range(0, 37, 8):
        stop = min(start + 8, 37)
        for j in tiles.visited(BOUNDS[mask], start + 16, stop - 1 + 16, 37, 53, 4):
            assert kept[start:stop, j * 4 : (j + 1) * 4].any()


def test_counts_of_a_large_problem_take_milliseconds() -> None:
    tiles.count.cache_clear()
    start = time.perf_counter()
    counts = tiles.count(RowBounds(sympy.Max(0, Q - 4095), Q), "bottom_right", 65536, 65536, 64, 64)
    assert time.perf_counter() - start < 0.25  # a loop over the elements takes minutes
    assert counts.kept == 4096 * 65536 - 4096 * 4095 // 2
    assert counts.q_tiles == 1024


def test_causal_by_hand() -> None:
    counts = tiles.count(BOUNDS["causal"], "bottom_right", 256, 256, 128, 64)
    assert counts.per_q_tile == (2, 4)
    assert counts.masked == 4  # two diagonal tiles in each q tile
    assert counts.kept == 256 * 257 // 2
