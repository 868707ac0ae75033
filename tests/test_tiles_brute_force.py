"""Every mask of the gallery, and random ones: the tiles that a plan visits against every element."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_truth import compiled
from stopwatch import within

from flashgen.arch import ARCHS
from flashgen.plan import Workload, solve, tile_map
from flashgen.plan.coverage import Coverage, _looked_at
from flashgen.plan.tile_map import look
from flashgen.plan.tiles import TileClass
from flashgen.spec import AttentionSpec
from flashgen.spec.gallery import GALLERY
from flashgen.spec.sample import sample_tensor

# Whole tiles, ragged ones, more queries than keys and more keys than queries, one row, and nothing to see.
LENGTHS = [(96, 96), (129, 129), (61, 150), (150, 61), (1, 77), (200, 8)]
TILES = [(64, 32), (32, 48), (16, 16), (128, 64), (48, 80), (7, 5)]
ALIGNMENTS = ["bottom_right", "top_left"]
BATCH, HEADS_Q, HEADS_KV = 3, 4, 2


def coverage(mask: str, align: str, lengths: tuple[int, int], **declared: Any) -> Coverage:
    seqlen_q, seqlen_kv = lengths
    spec = AttentionSpec(
        name="mask",
        attention={
            "heads": {"q": HEADS_Q, "kv": HEADS_KV}, "head_dim": 64, "mask": mask, "align": align, **declared
        },
        workload={"batch": BATCH, "seqlen": {"q": seqlen_q, "kv": seqlen_kv}},
    )  # fmt: skip
    return Workload.of(spec).coverage


@lru_cache(maxsize=256)
def truth(of: Coverage, batch: int, head: int) -> np.ndarray[Any, Any]:
    """Kept elements, [seqlen_q, seqlen_kv], one by one; tensors as the gallery's samples have them."""
    shift = of.seqlen_kv - of.seqlen_q if of.align == "bottom_right" else 0
    sizes = {"heads_q": of.heads_q, "heads_kv": of.heads_kv, "batch": of.batch}
    lengths = {"seqlen_q": of.seqlen_q, "seqlen_kv": of.seqlen_kv}
    reads = {}
    for tensor in of.tensors:
        array = sample_tensor(tensor, **sizes, **lengths)
        assert array is not None
        starts = [{"q": shift, "q - kv": shift - of.seqlen_kv + 1}.get(str(axis), 0) for axis in tensor.index]
        reads[tensor.name] = _element(array, starts)
    keeps = compiled(of.mask.condition, reads)
    known = {"batch": batch, "head": head, "head_kv": head * of.heads_kv // of.heads_q, **lengths}
    rows = [
        [bool(keeps(**known, q=row + shift, kv=kv)) for kv in range(of.seqlen_kv)]
        for row in range(of.seqlen_q)
    ]
    return np.array(rows, dtype=bool).reshape(of.seqlen_q, of.seqlen_kv)


def _element(array: np.ndarray[Any, Any], starts: list[int]) -> Any:
    def read(*subscripts: int) -> int:
        places = (
            min(max(subscript - start, 0), length - 1)
            for subscript, start, length in zip(subscripts, starts, array.shape, strict=True)
        )
        return int(array[tuple(places)])

    return read


def assert_tiles(
    of: Coverage, batch: int, head: int, tile_q: int, tile_kv: int, *, no_empty_one: bool
) -> None:
    kept = truth(of, batch, head)
    classes = of.classes(batch, head, tile_q, tile_kv)
    assert classes.shape == (-(-of.seqlen_q // tile_q), -(-of.seqlen_kv // tile_kv))
    visited = masked = kv_rows = 0
    for (i, j), found in np.ndenumerate(classes):
        block = kept[i * tile_q : (i + 1) * tile_q, j * tile_kv : (j + 1) * tile_kv]
        where = f"{of.mask.label} {of.align} {kept.shape} tile {i}, {j} of {tile_q} x {tile_kv}"
        if found == TileClass.SKIPPED:
            assert not block.any(), f"a kept element is skipped: {where}"
            continue
        visited, masked, kv_rows = (
            visited + 1,
            masked + (found == TileClass.PARTIAL),
            kv_rows + block.shape[1],
        )
        if found == TileClass.FULL:
            assert block.all() and block.shape[1] == tile_kv, f"a partial tile is called full: {where}"
        elif of.mask.derivation.route == "map":
            assert not block.all() or block.shape[1] < tile_kv, f"a full tile is masked: {where}"
        assert block.any() or not no_empty_one, f"an empty tile is visited: {where}"
    counts = of.count_of(batch, head, tile_q, tile_kv)
    assert (counts.visited, counts.masked, counts.kv_rows) == (visited, masked, kv_rows)
    assert counts.per_q_tile == tuple((classes != TileClass.SKIPPED).sum(axis=1).tolist())
    assert counts.kept == kept.sum()


MASKS = {name: entry.sample for name, entry in GALLERY.items() if entry.kind == "mask"}


@pytest.mark.parametrize("align", ALIGNMENTS)
@pytest.mark.parametrize("mask", sorted(MASKS))
def test_the_gallery(mask: str, align: str) -> None:
    """No kept element is skipped, no partial tile called full, and no empty tile visited."""
    for lengths in LENGTHS:
        of = coverage(MASKS[mask], align, lengths)
        assert of.basis in ("exact", "sample")
        for batch in range(BATCH if "batch" in of.mask.derivation.over else 1):
            for tile_q, tile_kv in TILES:
                assert_tiles(of, batch, 0, tile_q, tile_kv, no_empty_one=True)


COMPOSED = [
    "causal and document",
    "document or kv < 8",
    "(window(24) or dilated(9, 5)) and padding",
    "chunked(32) or kv < 4",
    "causal and (head < 2 or q - kv < 24)",
    "where(head_kv == 0, causal, band(9))",
    "natten_2d(16, 12, 2) and causal",
    "prefix_lm(20) and not band(3)",
    "kv % 16 < 4 and causal",
]


@pytest.mark.parametrize("mask", COMPOSED)
def test_compositions(mask: str) -> None:
    for align, lengths in product(ALIGNMENTS, [(129, 129), (61, 150), (150, 61)]):
        of = coverage(mask, align, lengths)
        for batch, head in of.representatives():
            for tile_q, tile_kv in [(64, 32), (48, 80)]:
                assert_tiles(of, batch, head, tile_q, tile_kv, no_empty_one=False)


LEAVES = st.one_of(
    st.sampled_from(["causal", "document", "padding", "kv % 3 == 0", "q % 5 < 2", "head == 1", "q != kv"]),
    st.builds("{} / {} {} {}".format, st.sampled_from(["q", "2 * q", "head", "seqlen_q"]),
              st.sampled_from(["seqlen_kv", "(batch + 3)"]), st.sampled_from(["<", ">="]), st.integers(0, 2)),
    st.builds("window({})".format, st.integers(1, 40)),
    st.builds("band({})".format, st.integers(0, 30)),
    st.builds("chunked({})".format, st.integers(1, 40)),
    st.builds("block_causal({})".format, st.integers(1, 40)),
    st.builds("dilated({}, {})".format, st.integers(1, 9), st.integers(1, 5)),
    st.builds("{} * kv {} q - 4".format, st.integers(1, 3), st.sampled_from(["<=", ">", "=="])),
    st.builds("kv {} {}".format, st.sampled_from(["<", ">="]), st.integers(0, 70)),
    st.builds("min(kv, {}) > q // {} - {}".format, st.integers(1, 50), st.integers(1, 4), st.integers(0, 9)),
)  # fmt: skip
TEXTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} or {})".format, inner, inner),
        st.builds("not ({})".format, inner),
        st.builds("where({}, {}, {})".format, inner, inner, inner),
    ),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(
    mask=TEXTS,
    align=st.sampled_from(ALIGNMENTS),
    seqlen_q=st.integers(1, 70),
    seqlen_kv=st.integers(1, 70),
    which=st.tuples(st.integers(0, BATCH - 1), st.integers(0, HEADS_Q - 1)),
    tile=st.sampled_from(TILES),
)
def test_random_masks(
    mask: str, align: str, seqlen_q: int, seqlen_kv: int, which: tuple[int, int], tile: tuple[int, int]
) -> None:
    of = coverage(mask, align, (seqlen_q, seqlen_kv))
    assert_tiles(of, *which, *tile, no_empty_one=False)


# -- what is not known ---------------------------------------------------------------------------------------

UNKNOWN: Mapping[str, Any] = {
    "params": {"size": "runtime"},
    "tensors": {
        "seg": {"index": ["batch", "kv"], "dtype": "int32", "sorted": True},
        "keep": {"index": ["q", "kv"], "dtype": "bool"},
    },
}


@pytest.mark.parametrize(
    ("mask", "around"),
    [
        ("causal and q - kv < size", "causal"),
        ("seg[q] == seg[kv] and causal", "causal"),
        ("keep and window(30)", "window(30)"),
        ("keep or kv < size", "full"),
    ],
)
def test_unknown_tensors_and_parameters_leave_a_hull(mask: str, around: str) -> None:
    of, hull = (
        coverage(mask, "bottom_right", (129, 129), **UNKNOWN),
        coverage(around, "bottom_right", (129, 129)),
    )
    assert of.basis == "hull"
    for tile_q, tile_kv in TILES:
        counts = of.count(tile_q, tile_kv)
        assert counts.per_q_tile == hull.count(tile_q, tile_kv).per_q_tile
        assert counts.masked == counts.visited, "no tile is known to be full"
        assert not (of.classes(0, 0, tile_q, tile_kv) == TileClass.FULL).any()


def test_heads_that_differ_are_averaged() -> None:
    of = coverage("causal and (head < 2 or q - kv < 24)", "bottom_right", (128, 128))
    each = [of.count_of(0, head, 64, 32).visited for head in range(HEADS_Q)]
    assert each[0] == each[1] > each[2] == each[3]
    assert of.mean_tiles(64, 32)[0] == sum(each) / HEADS_Q
    assert of.count(64, 32).visited == pytest.approx(sum(each) / HEADS_Q, abs=0.5)  # whole tiles


@pytest.mark.parametrize(
    "mask", ["padding", "(document and causal) or kv < 4", "padding and (head > 2 or q % 3 == 1)"]
)
def test_a_mean_is_rounded_once(mask: str) -> None:
    of = coverage(mask, "bottom_right", (129, 300))
    for tile_q, tile_kv in TILES:
        each = [of.count_of(*which, tile_q, tile_kv) for which in of.representatives()]
        exact = [
            Fraction(sum(getattr(counts, name) for counts in each), len(each))
            for name in ("visited", "masked", "kv_rows", "kept")
        ]
        assert of.mean_tiles(tile_q, tile_kv) == tuple(exact[:2])
        counts = of.count(tile_q, tile_kv)
        rounded = (counts.visited, counts.masked, counts.kv_rows, counts.kept)
        assert all(abs(a - b) <= Fraction(1, 2) for a, b in zip(rounded, exact, strict=True))
        assert counts.masked <= counts.visited
        for place, count in enumerate(counts.per_q_tile):
            assert abs(count - Fraction(sum(c.per_q_tile[place] for c in each), len(each))) <= 1


# -- long sequences ------------------------------------------------------------------------------------------


def test_rows_are_looked_at_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = "causal and (q - kv) % 3 < 2"
    at_once = coverage(mask, "bottom_right", (300, 515)).classes(0, 0, 48, 80)
    looked_at: list[int] = []

    def recorded(keep: Any, *arguments: Any) -> Any:
        def counted(part: slice, kv: Any) -> Any:
            looked_at.append((part.stop - part.start) * len(kv))
            return keep(part, kv)

        return look(counted, *arguments)

    monkeypatch.setattr(tile_map, "AT_A_TIME", 16 * 515)
    monkeypatch.setattr("flashgen.plan.coverage.look", recorded)
    _looked_at.cache_clear()
    again = coverage(mask, "bottom_right", (300, 515)).classes(0, 0, 48, 80)
    assert (again == at_once).all()
    assert len(looked_at) == 19 and max(looked_at) <= 16 * 515


def test_maps_of_long_sequences_are_counted_from_bands_of_rows() -> None:
    lengths = (16384, 16384)
    of = coverage("causal and (q - kv) % 2 == 0", "bottom_right", lengths)
    causal = coverage("causal", "bottom_right", lengths).count(128, 128)
    counts = of.count(128, 128)
    assert counts.visited == pytest.approx(causal.visited, rel=0.01)
    assert counts.masked == counts.visited
    assert counts.kept == pytest.approx(causal.kept / 2, rel=0.02)
    assert of.classes(0, 0, 128, 128).shape == (128, 128)


def test_heads_and_batches_are_looked_at_once_for_all_tilings() -> None:
    spec = AttentionSpec(
        name="mask",
        attention={
            "heads": {"q": 4, "kv": 2},
            "head_dim": 128,
            "mask": "doc[head] == doc[kv]",
            "tensors": {"doc": {"index": ["batch", "kv"], "dtype": "int32"}},
        },
        workload={"batch": 8, "seqlen": 2048},
    )
    assert len(Workload.of(spec).coverage.representatives()) == 16
    solve(spec, ARCHS["sm_80"])  # what is loaded and compiled once is not what is timed
    _looked_at.cache_clear()
    with within(4):
        solve(spec, ARCHS["sm_90a"])
    assert _looked_at.cache_info().misses == 16
