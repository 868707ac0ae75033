"""Constraints: the layouts of docs/architecture.md recomputed by hand; bounds against direct evaluation."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flashgen.arch import ARCHS
from flashgen.plan.constraints import (
    FAMILIES,
    REGISTER_SPLITS,
    Limit,
    Multiple,
    Requirement,
    bound,
    largest,
    smem_and_registers,
    usage,
    violations,
)
from flashgen.plan.model import Sm80Schedule, Sm90Schedule
from flashgen.plan.tiling import STAGES, TILE_KV, TILE_Q, Head, Tiling, pitch

H200, L40S = ARCHS["sm_90a"], ARCHS["sm_89"]

HEAD_DIMS = st.sampled_from([8, 40, 64, 72, 80, 96, 128, 160, 192, 256])
SM80 = st.builds(
    Tiling,
    st.just("sm80"),
    st.sampled_from([32, 64, 96, 128, 256]),
    st.integers(1, 16).map(lambda n: 16 * n),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.builds(Sm80Schedule, st.booleans()),
)


@st.composite
def sm90(draw: st.DrawFn) -> Tiling:
    warpgroups = draw(st.integers(1, 4))
    producer, consumer = draw(st.sampled_from(REGISTER_SPLITS[warpgroups]))
    return Tiling(
        "sm90",
        64 * warpgroups,
        16 * draw(st.integers(1, 17)),
        draw(st.integers(1, 4)),
        4 * warpgroups,
        Sm90Schedule(
            p_in_registers=draw(st.booleans()),
            overlap=draw(st.booleans()),
            ping_pong=draw(st.booleans()),
            q_register_steps=draw(st.integers(0, 3)),
            q_stages=draw(st.integers(1, 2)),
            extra_v_stages=draw(st.integers(0, 2)),
            cluster=draw(st.integers(1, 2)),
            reference=draw(st.sampled_from(["running", "first"])),
            edge_tiles=draw(st.sampled_from(["inline", "apart"])),
            tile_order=draw(st.sampled_from(["static", "dynamic", "stream_k"])),
            pack_gqa=draw(st.booleans()),
            o_buffer=draw(st.sampled_from(["q", "v", "own"])),
            producer_registers=producer,
            consumer_registers=consumer,
        ),
    )


def up(size: int, to: int) -> int:
    return -(-size // to) * to


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_an_sm80_row_has_no_bank_conflicts(head_dim: int) -> None:
    """Eight rows of ldmatrix, 16 bytes each: an odd number of chunks apart, or swizzled in eights."""
    chunks = pitch(head_dim) // 8
    assert pitch(head_dim) >= head_dim and pitch(head_dim) % 8 == 0
    assert chunks % 8 == 0 or chunks % 2 == 1


@settings(deadline=None)
@given(tiling=SM80, d_qk=HEAD_DIMS, d_v=HEAD_DIMS)
def test_sm80_shared_memory_as_documented(tiling: Tiling, d_qk: int, d_v: int) -> None:
    q, o = 2 * tiling.tile_q * pitch(d_qk), 2 * tiling.tile_q * pitch(d_v)
    kv = 2 * tiling.stages * tiling.tile_kv * (pitch(d_qk) + pitch(d_v))
    in_registers = tiling.schedule == Sm80Schedule(q_in_registers=True)
    smem, _ = smem_and_registers(tiling, Head(d_qk, d_v), H200)
    assert smem == (max(q, kv, o) if in_registers else max(q, o) + kv)


@settings(deadline=None)
@given(tiling=sm90(), d_qk=HEAD_DIMS, d_v=HEAD_DIMS)
def test_sm90_shared_memory_as_documented(tiling: Tiling, d_qk: int, d_v: int) -> None:
    schedule = tiling.schedule
    assert isinstance(schedule, Sm90Schedule)
    smem = 2 * schedule.q_stages * tiling.tile_q * up(d_qk, 64) + 2048
    v_stages = tiling.stages + schedule.extra_v_stages
    smem += 2 * tiling.tile_kv * (tiling.stages * up(d_qk, 64) + v_stages * up(d_v, 64))
    smem += 0 if schedule.p_in_registers else 2 * tiling.tile_q * up(tiling.tile_kv, 64)
    smem += 2 * tiling.tile_q * up(d_v, 64) if schedule.o_buffer == "own" else 0
    assert smem_and_registers(tiling, Head(d_qk, d_v), H200)[0] == smem


@settings(deadline=None)  # the first example compiles the expressions
@given(
    tiling=st.one_of(SM80, sm90()),
    d_qk=HEAD_DIMS,
    d_v=HEAD_DIMS,
    unknown=st.sampled_from([TILE_KV, TILE_Q, STAGES]),
)
def test_a_solved_bound_is_where_direct_evaluation_breaks(
    tiling: Tiling, d_qk: int, d_v: int, unknown: sympy.Symbol
) -> None:
    """On every limit that the unknown enters: used <= allowed exactly up to the bound.

    Where P is staged in whole panels, the bound is necessary and not sufficient.
    """
    family = FAMILIES[tiling.family]
    values = tiling.values(Head(d_qk, d_v), L40S)
    limits = [c for c in family.constraints if isinstance(c, Limit) and not c.allowed.has(unknown)]

    def holds(size: int) -> bool:
        at = values | {unknown: size}
        return all(c.used.subs(at) <= c.allowed.subs(at) for c in limits if c.used.has(unknown))

    most, limit = largest(family, unknown, values)
    assume(most < inf)
    if most < 1:
        assert not holds(1)
    else:
        assert limit is not None
        in_panels = isinstance(tiling.schedule, Sm90Schedule) and not tiling.schedule.p_in_registers
        assert holds(int(most)) or (in_panels and unknown == TILE_KV)
        assert not holds(int(most) + 1)


def test_a_bound_is_a_formula() -> None:
    (smem, *_) = FAMILIES["sm90"].constraints
    assert isinstance(smem, Limit)
    (solved,) = bound(smem, TILE_KV)
    values = Tiling("sm90", 128, 16, 2, 8, Sm90Schedule()).values(Head(256, 256), H200)
    assert solved.subs(values) == sympy.Rational(232_448 - 65_536 - 2_048, 2_048)
    assert solved.free_symbols >= {TILE_Q, STAGES}


@pytest.mark.parametrize(
    "d_qk, d_v, tile_q, tile_kv, schedule",
    [
        (64, 64, 192, 128, Sm90Schedule(ping_pong=True, producer_registers=32, consumer_registers=160)),
        (64, 64, 192, 192, Sm90Schedule(p_in_registers=False, producer_registers=32, consumer_registers=160)),
        (96, 96, 192, 128, Sm90Schedule(p_in_registers=False, producer_registers=32, consumer_registers=160)),
        (128, 128, 128, 128, Sm90Schedule()),
        (128, 128, 128, 176, Sm90Schedule()),
        (192, 192, 128, 112, Sm90Schedule()),
        (192, 128, 128, 128, Sm90Schedule()),
        (256, 256, 128, 80, Sm90Schedule()),
    ],
)
def test_known_good_hopper_tiles_are_legal(
    d_qk: int, d_v: int, tile_q: int, tile_kv: int, schedule: Sm90Schedule
) -> None:
    assert violations(Tiling("sm90", tile_q, tile_kv, 2, tile_q // 16, schedule), Head(d_qk, d_v), H200) == ()


@pytest.mark.parametrize(
    "d, tile_q, tile_kv, warps, target",
    [
        (64, 128, 128, 4, "sm_80"),
        (128, 128, 64, 4, "sm_80"),
        (128, 128, 32, 4, "sm_89"),
        (128, 64, 64, 4, "sm_86"),
        (256, 128, 64, 8, "sm_80"),
        (256, 64, 64, 4, "sm_80"),
        (256, 64, 32, 4, "sm_120a"),
    ],
)
def test_known_good_ampere_tiles_are_legal(
    d: int, tile_q: int, tile_kv: int, warps: int, target: str
) -> None:
    assert (
        violations(Tiling("sm80", tile_q, tile_kv, 1, warps, Sm80Schedule()), Head(d, d), ARCHS[target]) == ()
    )


ONE = Sm90Schedule(ping_pong=False, producer_registers=56, consumer_registers=248)
TWO = Sm90Schedule()
THREE = Sm90Schedule(producer_registers=32, consumer_registers=160)


@pytest.mark.parametrize(
    "tiling, d, broken",
    [
        (Tiling("sm90", 128, 96, 2, 8, Sm90Schedule()), 256, {"shared memory"}),
        (Tiling("sm90", 192, 192, 2, 12, THREE), 64, {"registers"}),
        (Tiling("sm90", 192, 64, 2, 12, Sm90Schedule()), 64, {"register pool"}),
        (
            Tiling("sm90", 128, 264, 1, 8, Sm90Schedule(overlap=False)),
            64,
            {"WGMMA width of S", "WGMMA depth"},
        ),
        (Tiling("sm90", 256, 64, 2, 8, Sm90Schedule()), 64, {"WGMMA rows"}),
        (Tiling("sm90", 64, 64, 2, 4, replace(ONE, ping_pong=True)), 64, {"ping-pong"}),
        (Tiling("sm90", 64, 64, 2, 4, replace(ONE, consumer_registers=240)), 64, {"setmaxnreg of consumers"}),
        (
            Tiling("sm90", 128, 64, 2, 8, replace(TWO, producer_registers=176)),
            64,
            {"setmaxnreg of the producer", "register pool"},
        ),
        (
            Tiling("sm90", 128, 64, 2, 8, replace(TWO, consumer_registers=264)),
            64,
            {"setmaxnreg", "register pool"},
        ),
        (Tiling("sm90", 128, 64, 2, 8, replace(TWO, producer_registers=16)), 64, {"producer"}),
        (Tiling("sm90", 128, 64, 2, 8, replace(TWO, cluster=4)), 64, {"cluster", "producer"}),
        (Tiling("sm90", 128, 64, 2, 8, replace(TWO, cluster=2, tile_order="dynamic")), 64, {"producer"}),
        (Tiling("sm90", 128, 64, 2, 8, replace(TWO, pack_gqa=True)), 64, {"packed heads"}),
        (Tiling("sm90", 64, 16, 16, 4, replace(ONE, q_stages=16)), 8, {"barriers"}),
        # The emulator shows how this one hangs.
        (
            Tiling("sm90", 128, 64, 1, 8, replace(TWO, o_buffer="v", extra_v_stages=1)),
            64,
            {"O staged in V, beside K"},
        ),
        (
            Tiling("sm90", 192, 64, 2, 12, replace(THREE, o_buffer="v")),
            64,
            {"O staged in V, each warpgroup"},
        ),
        (
            Tiling("sm90", 320, 16, 2, 20, replace(TWO, consumer_registers=80)),
            8,
            {"warpgroups"},
        ),
        (Tiling("sm90", 128, 64, 2, 8, Sm90Schedule(consumer_registers=236)), 64, {"setmaxnreg step"}),
        (Tiling("sm80", 128, 128, 1, 4, Sm80Schedule()), 128, {"registers"}),
        (Tiling("sm80", 128, 40, 1, 4, Sm80Schedule()), 64, {"mma depth"}),
        (Tiling("sm80", 96, 32, 1, 4, Sm80Schedule()), 64, {"rows per warp"}),
        (Tiling("sm80", 576, 16, 1, 36, Sm80Schedule()), 16, {"threads"}),
        (Tiling("sm80", 0, 0, 0, 4, Sm80Schedule()), 64, {"rows per warp", "mma depth", "stages"}),
    ],
)
def test_each_constraint_can_break(tiling: Tiling, d: int, broken: set[str]) -> None:
    assert {use.constraint.name for use in violations(tiling, Head(d, d), H200)} == broken


def test_o_cannot_be_staged_in_a_smaller_q() -> None:
    tiling = Tiling("sm90", 128, 64, 2, 8, Sm90Schedule())
    assert [u.constraint.name for u in violations(tiling, Head(64, 128), H200)] == ["O staged in Q"]


@pytest.mark.parametrize(
    "group, packs", [(1, False), (2, True), (8, True), (64, True), (6, False), (71, False)]
)
def test_packed_heads_fill_a_warpgroup(group: int, packs: bool) -> None:
    tiling = Tiling("sm90", 128, 64, 2, 8, replace(TWO, pack_gqa=True))
    assert (violations(tiling, Head(64, 64, group), H200) == ()) is packs


@pytest.mark.parametrize("warpgroups, allotted", [(1, 248), (2, 168), (3, 128), (4, 96)])
def test_register_splits_stay_within_what_the_launch_allots(warpgroups: int, allotted: int) -> None:
    """`allotted` a thread is what ptxas reports for these blocks; the pool is that, whoever takes it."""
    threads = 128 * (warpgroups + 1)
    for producer, consumer in REGISTER_SPLITS[warpgroups]:
        assert producer <= allotted <= consumer
        assert 128 * (producer + warpgroups * consumer) <= threads * allotted
        schedule = Sm90Schedule(
            ping_pong=warpgroups > 1, producer_registers=producer, consumer_registers=consumer
        )
        tiling = Tiling("sm90", 64 * warpgroups, 16, 2, 4 * warpgroups, schedule)
        assert violations(tiling, Head(64, 64), H200) == ()
        uses = {use.constraint.name: use for use in usage(tiling, Head(64, 64), H200)}
        assert uses["register pool"].allowed == threads * allotted


def test_relations_are_sympy() -> None:
    for family in FAMILIES.values():
        for constraint in family.constraints:
            assert isinstance(constraint, Limit | Multiple | Requirement)
            assert isinstance(constraint.relation, sympy.core.relational.Relational)
        tiling = Tiling("sm80", 128, 64, 1, 4, Sm80Schedule())
        values = tiling.values(Head(128, 128), H200)
        for use in usage(tiling, Head(128, 128), H200):
            assert bool(use.constraint.relation.subs(values).doit()) == use.holds
