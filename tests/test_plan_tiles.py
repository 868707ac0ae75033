"""Visits and counts of tiles from the intervals of rows, against the elements that the intervals hold."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from stopwatch import within

from flashgen.plan import tiles
from flashgen.plan.tiles import Ends, TileClass
from flashgen.spec.bounds import RowBounds
from flashgen.spec.symbols import SEQLEN_KV, SEQLEN_Q, Q

SEGMENTS = {
    "full": [RowBounds(None, None)],
    "causal": [RowBounds(None, Q)],
    "window": [RowBounds(sympy.Max(0, Q - 6), Q)],
    "lookahead": [RowBounds(Q - 3, Q + 5)],
    "chunked": [RowBounds(8 * sympy.floor(Q / 8), Q)],
    "uneven": [RowBounds(sympy.floor((2 * Q + 1) / 3), sympy.Min(Q + 2, SEQLEN_KV - 2))],
    "prefix": [RowBounds(None, sympy.Max(Q, 9))],
    "lengths": [RowBounds(None, Q + SEQLEN_Q - 4)],
    "past the end": [RowBounds(Q + 40, Q + 60)],
    "sink": [RowBounds(None, sympy.Integer(2)), RowBounds(Q - 6, Q)],
    "overlapping": [RowBounds(None, Q), RowBounds(Q - 9, Q + 3), RowBounds(Q + 5, None)],
    "touching": [RowBounds(None, Q - 4), RowBounds(Q - 3, Q + 2)],
    "some rows": [RowBounds(None, sympy.Piecewise((-1, Q < 11), (4, True))), RowBounds(Q, Q)],
    "nothing": [RowBounds(None, sympy.Integer(-1))],
}
Align = Literal["bottom_right", "top_left"]


def ends_of(mask: str, align: Align, seqlen_q: int, seqlen_kv: int) -> list[Ends]:
    rows = np.arange(seqlen_q) + tiles.row_shift(align, seqlen_q, seqlen_kv)
    return [tiles.row_ends(segment, rows, seqlen_q, seqlen_kv, {}) for segment in SEGMENTS[mask]]


def truth(mask: str, align: Align, seqlen_q: int, seqlen_kv: int) -> np.ndarray:
    """Kept pairs, [segments, seqlen_q, seqlen_kv], row by row."""
    kept = np.zeros((len(SEGMENTS[mask]), seqlen_q, seqlen_kv), dtype=bool)
    shift = tiles.row_shift(align, seqlen_q, seqlen_kv)
    for n, segment in enumerate(SEGMENTS[mask]):
        for i in range(seqlen_q):
            first, last = segment.evaluate(i + shift, seqlen_q, seqlen_kv)
            kept[n, i, first : last + 1] = True
    return kept


SHAPES = {
    "align": st.sampled_from(["bottom_right", "top_left"]),
    "seqlen_q": st.integers(0, 40),
    "seqlen_kv": st.integers(0, 40),
    "tile_q": st.sampled_from([1, 4, 7, 16]),
    "tile_kv": st.sampled_from([1, 4, 5, 16]),
}


@settings(max_examples=250, deadline=None)
@given(mask=st.sampled_from(sorted(SEGMENTS)), **SHAPES)
def test_no_kept_element_is_skipped_and_no_partial_tile_called_full(
    mask: str, align: Align, seqlen_q: int, seqlen_kv: int, tile_q: int, tile_kv: int
) -> None:
    each = truth(mask, align, seqlen_q, seqlen_kv)
    kept = each.any(axis=0)
    ends = ends_of(mask, align, seqlen_q, seqlen_kv)
    classes = tiles.classes(ends, seqlen_kv, tile_q, tile_kv)
    per_q_tile, masked, kv_rows = [], 0, 0
    for number, start in enumerate(range(0, seqlen_q, tile_q)):
        stop = min(start + tile_q, seqlen_q)
        four = [[int(end[row]) for row in (start, stop - 1) for end in pair] for pair in ends]
        visits = tiles.visits(four, tile_kv)
        seen = dict(visits)
        assert [tile for tile, _ in visits] == sorted(seen), "ascending, none twice"
        per_q_tile.append(len(seen))
        for j in range(-(-seqlen_kv // tile_kv)):
            here = (slice(start, stop), slice(j * tile_kv, (j + 1) * tile_kv))
            if j not in seen:
                assert not kept[here].any()
                assert classes[number, j] == TileClass.SKIPPED
                continue
            kv_rows += kept[here].shape[1]
            whole = kept[here].shape[1] == tile_kv and any(segment[here].all() for segment in each)
            assert seen[j] == (not whole)
            assert classes[number, j] == (TileClass.FULL if whole else TileClass.PARTIAL)
            masked += seen[j]
    counts = tiles.count(ends, seqlen_kv, tile_q, tile_kv)
    assert counts == tiles.TileCounts(tuple(per_q_tile), masked, kv_rows, int(kept.sum()))


@pytest.mark.parametrize("mask", ["full", "causal", "window", "sink", "touching"])
def test_no_empty_tile_is_visited(mask: str) -> None:
    kept = truth(mask, "bottom_right", 37, 53).any(axis=0)
    classes = tiles.classes(ends_of(mask, "bottom_right", 37, 53), 53, 8, 4)
    for i, j in np.argwhere(classes != TileClass.SKIPPED):
        assert kept[8 * i : 8 * i + 8, 4 * j : 4 * j + 4].any()


def test_counts_of_a_large_problem_take_milliseconds() -> None:
    window = RowBounds(sympy.Max(0, Q - 4095), Q)
    with within(0.25):  # a loop over the elements takes minutes
        ends = tiles.row_ends(window, np.arange(65536), 65536, 65536, {})
        counts = tiles.count([ends], 65536, 64, 64)
    assert counts.kept == 4096 * 65536 - 4096 * 4095 // 2
    assert counts.q_tiles == 1024


def test_causal_by_hand() -> None:
    counts = tiles.count(ends_of("causal", "bottom_right", 256, 256), 256, 128, 64)
    assert counts.per_q_tile == (2, 4)
    assert counts.masked == 4  # two diagonal tiles in each q tile
    assert counts.kept == 256 * 257 // 2
