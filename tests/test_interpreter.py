"""The interpreter against float64, over head dims, GQA, masks, ragged lengths and layouts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import pytest
import sympy
import torch
from attention_cases import CASES, GALLERY_CASES, LAYOUTS, MASKS, Case, assert_exact
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgen.arch import arch
from flashgen.errors import LaunchError
from flashgen.plan import KernelPlan, MaskPlan, Sm90Schedule, solve
from flashgen.plan.model import ScorePlan
from flashgen.runtime import decisions, interpret, reference, same_precision, tolerance
from flashgen.spec import parse_spec
from flashgen.spec.bounds import RowBounds
from flashgen.spec.symbols import Q


@lru_cache(maxsize=512)
def _solved(text: str) -> KernelPlan:
    return solve(parse_spec(text), arch("sm_80"))


@lru_cache(maxsize=512)
def _mathematics(text: str) -> dict[str, Any]:
    attention = parse_spec(text).attention
    return {
        "mask": MaskPlan(attention.mask_label, attention.condition, attention.derivation),
        "score": ScorePlan(attention.score_label, attention.score_expr),
        "tensors": attention.inputs,
        "parameters": attention.runtime,
        "sink": attention.sink,
    }


def plan_of(case: Case, **changes: Any) -> KernelPlan:
    """Small tiles make many of them out of short lengths; whether they fit a chip is all the same here."""
    general = replace(case, batch=1, seqlen_q=256, seqlen_kv=256)
    plain = replace(general, mask="full", score=None, params={}, inputs={}, sink=False)
    return replace(_solved(plain.text()), **{**_mathematics(general.text()), **changes})


@settings(max_examples=120, deadline=None)
@given(case=CASES, tile_q=st.sampled_from((16, 64, 128)), tile_kv=st.sampled_from((16, 48, 64, 128)))
def test_error_is_at_most_twice_the_textbooks(case: Case, tile_q: int, tile_kv: int) -> None:
    q, k, v = case.tensors()
    o, lse = interpret(plan_of(case, tile_q=tile_q, tile_kv=tile_kv), q, k, v)
    assert_exact(case, o, lse, q, k, v)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_more_queries_than_keys(mask: Any, align: str) -> None:
    """Aligned at the end, the first rows of a causal mask have no key at all."""
    case = Case(mask=mask, align=align, seqlen_q=70, seqlen_kv=20, heads_kv=2, group=2)
    q, k, v = case.tensors()
    o, lse = interpret(plan_of(case, tile_q=16, tile_kv=16), q, k, v)
    assert_exact(case, o, lse, q, k, v)
    if mask == "causal" and align == "bottom_right":
        assert torch.all(lse[:, :, :50] == -torch.inf) and not o[:, :50].any()


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_kv", "batch"), [(0, 5, 1), (5, 0, 1), (5, 5, 0), (0, 0, 1), (1, 1, 1)]
)
def test_lengths_of_zero_and_one(seqlen_q: int, seqlen_kv: int, batch: int) -> None:
    case = Case(mask="causal", seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, batch=batch)
    q, k, v = case.tensors()
    o, lse = interpret(plan_of(replace(case, batch=1)), q, k, v)
    assert o.shape == (batch, seqlen_q, 1, 64) and lse.shape == (batch, 1, seqlen_q)
    if seqlen_kv == 0:
        assert not o.any() and torch.all(lse == -torch.inf)
    if seqlen_q == seqlen_kv == 1:
        assert torch.equal(o, v)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
def test_strides_change_nothing(layout: str) -> None:
    case = Case(mask="causal", heads_kv=2, group=2, seqlen_q=40, seqlen_kv=50, layout=layout)
    plan = plan_of(case, tile_q=16, tile_kv=16)
    assert torch.equal(interpret(plan, *case.tensors())[0], interpret(plan, *case.contiguous().tensors())[0])


def test_families_share_the_arithmetic() -> None:
    case = Case(mask="causal", seqlen_q=100, seqlen_kv=100)
    plan = plan_of(case, tile_q=64, tile_kv=64)
    hopper = replace(plan, family="sm90", target="sm_90a", schedule=Sm90Schedule())
    assert torch.equal(interpret(plan, *case.tensors())[0], interpret(hopper, *case.tensors())[0])


@pytest.mark.parametrize("key_order", ["descending", "ascending"])
@pytest.mark.parametrize("pack_gqa", [False, True])
@pytest.mark.parametrize("mask", ["full", "causal", {"window": 40}], ids=str)
def test_hopper_schedules_are_exact(
    mask: Any, pack_gqa: bool, key_order: Literal["descending", "ascending"]
) -> None:
    """Each warpgroup of 64 rows decides on its own tiles, with packed heads too, in either order of keys."""
    case = Case(mask=mask, heads_kv=2, group=4, seqlen_q=150, seqlen_kv=210)
    schedule = Sm90Schedule(pack_gqa=pack_gqa, key_order=key_order)
    plan = replace(
        plan_of(case, tile_kv=16), family="sm90", target="sm_90a", tile_q=192, warps=12, schedule=schedule
    )
    q, k, v = case.tensors()
    assert_exact(case, *interpret(plan, q, k, v), q, k, v)


def test_the_order_of_the_keys_is_the_plans() -> None:
    """Rounding tells: the two orders add the same terms otherwise."""
    case = Case(mask="full", seqlen_q=64, seqlen_kv=500)
    plan = replace(plan_of(case, tile_kv=16), family="sm90", target="sm_90a")
    orders: tuple[Literal["descending", "ascending"], ...] = ("descending", "ascending")
    lse = [
        interpret(replace(plan, schedule=Sm90Schedule(key_order=order)), *case.tensors())[1]
        for order in orders
    ]
    assert not torch.equal(*lse)
    torch.testing.assert_close(*lse)


# -- masks and scores --------------------------------------------------------------------------------------


def _hopper(plan: KernelPlan, **changes: Any) -> KernelPlan:
    sizes = {"family": "sm90", "target": "sm_90a", "tile_q": 128, "warps": 8}
    return replace(plan, **{"schedule": Sm90Schedule(), **sizes, **changes})


@pytest.mark.parametrize("name", GALLERY_CASES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(150, 150), (70, 190), (130, 75)])
def test_gallery(name: str, seqlen_q: int, seqlen_kv: int) -> None:
    case = Case(heads_kv=2, group=2, batch=2, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, **GALLERY_CASES[name])
    q, k, v = case.tensors()
    given = case.given()
    ampere = plan_of(case, tile_q=32, tile_kv=16)
    for plan in (ampere, _hopper(ampere)):
        assert_exact(case, *interpret(plan, q, k, v, **given), q, k, v, **given)


def test_all_three_routes_are_tried() -> None:
    plans = [plan_of(Case(heads_kv=2, group=2, **parts)) for parts in GALLERY_CASES.values()]
    assert {plan.mask.derivation.route for plan in plans} == {"bounds", "ranges", "map"}
    assert any(len(plan.mask.derivation.segments) > 1 for plan in plans)
    assert {"batch", "head"} <= {axis for plan in plans for axis in plan.mask.derivation.over}


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("name", ["document", "natten_2d", "alibi", "sink", "sink_window"])
def test_gallery_without_queries_or_keys(name: str, lengths: tuple[int, int]) -> None:
    case = Case(seqlen_q=lengths[0], seqlen_kv=lengths[1], **GALLERY_CASES[name])
    q, k, v = case.tensors()
    given = case.given()
    o, lse = interpret(plan_of(case), q, k, v, **given)
    assert o.shape == (1, lengths[0], 1, 64) and not o.any()
    assert torch.all(lse == (given["sink"][:, None] if case.spec().attention.sink else -math.inf))


def test_scale_of_a_call_overrides_the_plans() -> None:
    case = Case(mask="causal")
    q, k, v = case.tensors()
    o, lse = interpret(plan_of(case), q, k, v, scale=0.7)
    expected, expected_lse = reference(case.spec(), q, k, v, scale=0.7)
    assert (o.double() - expected).abs().max() <= tolerance(
        expected, same_precision(case.spec(), q, k, v, scale=0.7)[0]
    )
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scale_must_be_positive_and_finite(scale: float) -> None:
    case = Case()
    with pytest.raises(LaunchError, match="scale must be positive"):
        interpret(plan_of(case), *case.tensors(), scale=scale)


# -- the interpreter can tell wrong plans from right ones --------------------------------------------------


def _fails(case: Case, plan: KernelPlan) -> bool:
    q, k, v = case.tensors()
    try:
        assert_exact(case, *interpret(plan, q, k, v), q, k, v)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(
    "bounds", [RowBounds(None, Q + 1), RowBounds(None, Q - 1), RowBounds(sympy.Integer(1), Q)]
)
def test_bounds_off_by_one_key_show(bounds: RowBounds) -> None:
    case = Case(mask="causal", seqlen_q=40, seqlen_kv=40)
    plan = plan_of(case, tile_q=16, tile_kv=16)
    assert not _fails(case, plan)
    assert _fails(case, replace(plan, mask=MaskPlan.of_bounds("causal", bounds)))


def test_a_tile_left_unmasked_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Case(seqlen_q=40, seqlen_kv=40)  # 40 keys in tiles of 16: the last tile's padding must be masked
    causal = replace(full, mask="causal")
    visits = decisions.visits
    monkeypatch.setattr(decisions, "visits", lambda *ends: [(tile, False) for tile, _ in visits(*ends)])
    for case in (full, causal):
        assert _fails(case, plan_of(case, tile_q=16, tile_kv=16))


def test_a_tile_left_out_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(seqlen_q=40, seqlen_kv=40)
    visits = decisions.visits
    monkeypatch.setattr(decisions, "visits", lambda *ends: visits(*ends)[1:])
    assert _fails(case, plan_of(case, tile_q=16, tile_kv=16))
