"""The solver against brute force, its explanations, its errors, and plans as data."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import yaml
from stopwatch import within

from flashgen.arch import ARCHS
from flashgen.errors import PlanError
from flashgen.plan import (
    KernelPlan,
    MaskPlan,
    Sm80Schedule,
    Sm90Schedule,
    Workload,
    plan_from_dict,
    rank,
    solve,
    validate,
)
from flashgen.plan import lattice as lattices
from flashgen.plan.constraints import FAMILIES, violations
from flashgen.plan.cost import cost
from flashgen.plan.tiling import Head, Tiling
from flashgen.spec import AttentionSpec, RowBounds, load_spec, parse_spec
from flashgen.spec.model import Tiles
from flashgen.spec.symbols import SEQLEN_KV, Q

H200 = ARCHS["sm_90a"]


def make_spec(
    *,
    heads: tuple[int, int] = (32, 8),
    head_dim: tuple[int, int] = (128, 128),
    mask: object = "causal",
    batch: int = 8,
    seqlen: tuple[int, int] = (4096, 4096),
    dtype: str = "bf16",
    **tiles: object,
) -> AttentionSpec:
    """A spec as a user writes it, so that its values have places."""
    data = {
        "flashgen": 1,
        "name": "example",
        "attention": {
            "heads": dict(zip(("q", "kv"), heads, strict=True)),
            "head_dim": dict(zip(("qk", "v"), head_dim, strict=True)),
            "dtype": dtype,
            "mask": mask,
        },
        "workload": {"batch": batch, "seqlen": dict(zip(("q", "kv"), seqlen, strict=True))},
        "tiles": tiles or "auto",
    }
    return parse_spec(yaml.safe_dump(data, sort_keys=False), "example.yaml")


# What the shipped specs ask for, by name.
MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": {},
    "llama3-70b": {"heads": (64, 8), "batch": 4, "seqlen": (8192, 8192)},
    "mistral-7b": {"mask": {"window": 4096}, "seqlen": (16384, 16384)},
    "gemma2-9b": {"heads": (16, 8), "head_dim": (256, 256)},
    "gpt2-medium": {"heads": (16, 16), "head_dim": (64, 64), "dtype": "fp16", "seqlen": (1024, 1024)},
    "bert-large": {"heads": (16, 16), "head_dim": (64, 64), "mask": "full", "seqlen": (512, 512)},
    "phi": {"heads": (32, 32), "head_dim": (80, 80)},
    "qk192-v128": {"heads": (16, 16), "head_dim": (192, 128)},
    "falcon-7b": {"heads": (71, 1), "head_dim": (64, 64)},
    "odd": {"head_dim": (72, 40), "seqlen": (1, 4095), "batch": 1},
}


def tiling_of(plan: KernelPlan) -> Tiling:
    return Tiling(plan.family, plan.tile_q, plan.tile_kv, plan.stages, plan.warps, plan.schedule)


@pytest.mark.parametrize("target", ARCHS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_solves_on_every_chip(model: str, target: str) -> None:
    plan = solve(make_spec(**MODELS[model]), ARCHS[target])
    validate(plan, ARCHS[target])
    assert plan.target == target
    assert plan.blocks_per_sm >= 1
    assert plan.why.binding and plan.why.slack and plan.why.rejected and plan.why.cost
    assert plan.why.origin in ("solved", "tuned")


@pytest.mark.parametrize("model", MODELS)
def test_the_hopper_family_is_taken_where_the_chip_has_it(model: str) -> None:
    plan = solve(make_spec(**MODELS[model]), H200)
    validate(plan, H200)
    assert plan.family == "sm90"
    assert plan.tile_q == 16 * plan.warps
    assert solve(make_spec(**MODELS[model]), ARCHS["sm_100a"]).family == "sm80"


@pytest.mark.parametrize("family, target", [("sm80", "sm_89"), ("sm80", "sm_90a"), ("sm90", "sm_90a")])
@pytest.mark.parametrize("head_dim", [(64, 64), (192, 128), (256, 256)])
def test_brute_force_agrees(
    family: str, target: str, head_dim: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every lattice point tried: the bounds leave out nothing legal and let in nothing illegal."""
    monkeypatch.setattr(lattices, "AVAILABLE_FAMILIES", (family,))
    arch, spec = ARCHS[target], make_spec(head_dim=head_dim, seqlen=(1024, 1024))
    work = Workload.of(spec)
    points = lattices.lattice(FAMILIES[family], work, lattices.Given())
    legal = [p for p in points if not violations(p, Head(*head_dim), arch)]
    ranking = rank(spec, arch, tunings=())
    assert {tiling_of(c.plan) for c in ranking.candidates} == set(legal)
    assert len(ranking.candidates) == len(legal)
    cheapest = min(cost(p, work, arch).seconds for p in legal)
    assert ranking.candidates[0].cost.seconds == cheapest
    assert cost(tiling_of(ranking.best), work, arch).seconds == cheapest
    seconds = [c.cost.seconds for c in ranking.candidates]
    assert seconds == sorted(seconds)


def test_solving_is_fast_and_deterministic() -> None:
    spec = make_spec()
    first = rank(spec, H200)
    with within(1):
        second = rank(spec, H200)
    assert first == second
    assert first.best.why == second.best.why


@pytest.mark.parametrize(
    "head_dim, target, expected",
    [
        (128, "sm_80", {(128, 64, 4)}),
    ],
)
def test_known_good_ampere_choices(head_dim: int, target: str, expected: set[tuple[int, int, int]]) -> None:
    plan = solve(make_spec(head_dim=(head_dim, head_dim), heads=(16, 16)), ARCHS[target])
    assert (plan.tile_q, plan.tile_kv, plan.warps) in expected


@pytest.mark.parametrize(
    "head_dim, tile_q, tile_kv",
    [
        (64, 192, {128, 192}),
        (128, 128, {128, 144, 160, 176, 192}),
        (192, 128, {112}),
        (256, 128, {80}),
    ],
)
def test_known_good_hopper_choices(head_dim: int, tile_q: int, tile_kv: set[int]) -> None:
    """Where hand-tuned kernels arrived for long sequences (hidden size 2048, seqlen 16k, full)."""
    heads = 2048 // head_dim
    spec = make_spec(
        head_dim=(head_dim, head_dim), heads=(heads, heads), mask="full", batch=1, seqlen=(16384, 16384)
    )
    plan = rank(spec, H200, tunings=()).best
    assert plan.tile_q == tile_q
    assert plan.tile_kv in tile_kv


@pytest.mark.parametrize(
    "given",
    [
        {"kv": 32},
        {"q": 64},
        {"stages": 2},
        {"warps": 8},
        {"q": 64, "kv": 48, "stages": 3},
        {"q": 48},
        {"q": 128, "kv": 64, "stages": 1, "warps": 4},
    ],
)
def test_what_is_given_is_kept(given: dict[str, int]) -> None:
    plan = solve(make_spec(**given), ARCHS["sm_80"])
    kept = {"q": plan.tile_q, "kv": plan.tile_kv, "stages": plan.stages, "warps": plan.warps}
    assert {name: kept[name] for name in given} == given
    assert plan.why.origin == ("given" if len(given) == 4 else "solved")
    axes = {"q": "tile_q", "kv": "tile_kv", "stages": "stages"}
    fixed = {axes[name] for name in given if name in axes}
    assert not any(neighbour.split("=")[0] in fixed for neighbour, _ in plan.why.rejected)


def test_a_given_schedule_is_kept() -> None:
    for choice in (True, False):
        ranking = rank(make_spec(schedule={"family": "sm80", "q_in_registers": choice}), H200)
        assert {c.plan.schedule for c in ranking.candidates} == {Sm80Schedule(q_in_registers=choice)}
    assert solve(make_spec(schedule={"family": "sm80"}), H200).family == "sm80"


def test_a_given_hopper_schedule_is_kept() -> None:
    plan = solve(make_spec(schedule={"q_stages": 2, "tile_order": "static", "key_order": "ascending"}), H200)
    assert isinstance(plan.schedule, Sm90Schedule)
    assert (plan.schedule.q_stages, plan.schedule.tile_order, plan.schedule.key_order) == (
        2,
        "static",
        "ascending",
    )
    assert solve(make_spec(schedule={"family": "sm80"}), H200).family == "sm80"


# -- errors ------------------------------------------------------------------------------------------------


def test_a_tile_that_does_not_fit_is_named_with_both_numbers() -> None:
    with pytest.raises(PlanError) as error:
        solve(make_spec(head_dim=(256, 256), kv=96, q=128), H200)
    (problem,) = error.value.problems
    assert problem.message == "tile_kv=96, tile_q=128 need 264,192 B of shared memory; sm_90a allows 232,448"
    assert str(problem.location) == "example.yaml:18:7"
    assert problem.hint == "the largest tile_kv that fits beside tile_q=128, stages=2, warps=8 is 80"
    assert error.value.exit_code == 2


def test_a_single_tile_needs() -> None:
    with pytest.raises(PlanError, match=r"tile_kv=256 needs [\d,]+ registers per thread; sm_89 allows 255"):
        solve(make_spec(head_dim=(256, 256), kv=256), ARCHS["sm_89"])


def test_several_broken_constraints_are_reported_together() -> None:
    with pytest.raises(PlanError) as error:
        solve(make_spec(q=96, kv=40, stages=2, warps=4), ARCHS["sm_80"])
    messages = [problem.message for problem in error.value.problems]
    assert messages == [
        "tile_q=96, warps=4 give 96, which must be a multiple of 64 "
        "(16 rows of mma.sync m16n8k16 for each warp)",
        "tile_kv=40 gives 40, which must be a multiple of 16 (the depth of mma.sync m16n8k16 in P V)",
    ]


def test_no_tile_is_reported_as_such() -> None:
    with pytest.raises(PlanError) as error:
        solve(make_spec(head_dim=(256, 256), q=256, stages=4), ARCHS["sm_86"])
    assert "allows 101,376" in str(error.value)
    assert "no tile_kv fits beside tile_q=256, stages=4" in str(error.value)


def test_a_schedule_field_of_another_family_is_refused() -> None:
    schedule = {"overlap": True, "q_stages": 2, "q_in_registers": True}
    with pytest.raises(PlanError, match="allowed: q_in_registers") as error:
        solve(make_spec(schedule=schedule), ARCHS["sm_80"])
    assert [(p.message, str(p.location)) for p in error.value.problems] == [
        ('family sm80 has no schedule field "overlap"', "example.yaml:19:14"),
        ('family sm80 has no schedule field "q_stages"', "example.yaml:20:15"),
    ]


@pytest.mark.parametrize(
    "tiles, message",
    [
        (
            {"q": 192, "schedule": {"consumer_registers": 240}},
            "consumer_registers=240 needs 96,256 registers per block; sm_90a allows 65,536",
        ),
        (
            {"q": 64, "schedule": {"ping_pong": True}},
            "ping_pong=true needs 8 warps to alternate .* there are 4",
        ),
        ({"schedule": {"cluster": 16}}, "cluster=16 needs 16 blocks in a cluster; the kernel takes 2"),
    ],
)
def test_a_hopper_schedule_that_does_not_fit(tiles: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        solve(make_spec(**tiles), H200)


@pytest.mark.parametrize(
    ("mask", "field", "value", "message"),
    [
        ("causal", "tile_order", "stream_k", "needs a mask that keeps every key"),
        ("full", "edge_tiles", "apart", "needs a mask with one interval of keys for each row"),
        ("document", "reference", "first", "needs a mask with one interval of keys for each row"),
        ("document", "pack_gqa", True, "needs a mask with one interval of keys for each row"),
        ("causal", "distance_terms", "early", "needs a score with terms that depend on q - kv alone"),
    ],
)
def test_a_schedule_that_the_mask_rules_out_is_named_and_placed(
    mask: str, field: str, value: object, message: str
) -> None:
    spec = make_spec(mask=mask, schedule={field: value})
    with pytest.raises(PlanError) as error:
        solve(spec, H200)
    (problem,) = error.value.problems
    assert problem.message.startswith(f"{field}={str(value).lower()} {message}")
    assert problem.location == spec.locate("tiles", "schedule", field) is not None


def test_early_distances_leave_the_heads_unpacked() -> None:
    spec = AttentionSpec(
        name="decode",
        attention={
            "heads": {"q": 16, "kv": 2},
            "head_dim": 128,
            "mask": "causal",
            "score": "score * exp(-abs(q - kv) / 64)",
        },
        workload={"batch": 8, "seqlen": {"q": 1, "kv": 4096}},
    )
    packed = solve(spec, H200).schedule
    tiles = Tiles.model_validate({"schedule": {"distance_terms": "early"}})
    early = solve(spec.model_copy(update={"tiles": tiles}), H200).schedule
    assert isinstance(packed, Sm90Schedule) and packed.pack_gqa
    assert isinstance(early, Sm90Schedule) and not early.pack_gqa and early.distance_terms == "early"


def test_only_values_that_hurt_are_named() -> None:
    schedule = {"reference": "running", "tile_order": "static", "o_buffer": "own", "edge_tiles": "inline"}
    with pytest.raises(PlanError) as error:
        solve(make_spec(head_dim=(256, 256), q=128, stages=16, schedule=schedule), H200)
    (problem,) = (p for p in error.value.problems if "shared memory" in p.message)
    assert problem.message.startswith("tile_q=128, stages=16, o_buffer=own need ")


def test_a_family_that_the_chip_lacks_is_refused() -> None:
    with pytest.raises(PlanError, match="family sm90 needs setmaxnreg, tma, wgmma, which sm_80 lacks"):
        solve(make_spec(schedule={"family": "sm90"}), ARCHS["sm_80"])


GALLERY = sorted((Path(__file__).parent.parent / "specs").glob("*.yaml"))


@pytest.mark.parametrize("target", ARCHS)
@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_the_gallery_solves_on_every_chip(path: Path, target: str) -> None:
    """And in the time that a user waits without noticing."""
    spec = load_spec(path)
    with within(1):
        plan = solve(spec, ARCHS[target])
    validate(plan, ARCHS[target])


# -- explanations ------------------------------------------------------------------------------------------


def numbers(text: str) -> Iterator[int]:
    return (int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", text))


@pytest.mark.parametrize("model", MODELS)
def test_reasons_are_true(model: str) -> None:
    """Slack shows no overrun; a rejected neighbour breaks the named constraint, or costs what is said."""
    spec = make_spec(**MODELS[model])
    ranking = rank(spec, H200, tunings=())
    best, by_tiling = ranking.best, {tiling_of(c.plan): c.cost.seconds for c in ranking.candidates}
    for _, text in best.why.slack:
        used, allowed = list(numbers(text))[:2]
        assert used <= allowed
    seen = set()
    for neighbour, why in best.why.rejected:
        axis, size = neighbour.split("=")
        seen.add(axis)
        others = {"tile_q": best.tile_q, "tile_kv": best.tile_kv, "stages": best.stages} | {axis: int(size)}
        costs = [s for t, s in by_tiling.items() if all(getattr(t, name) == v for name, v in others.items())]
        if costs:
            slower = min(costs) / ranking.candidates[0].cost.seconds - 1
            assert why == f"{100 * slower:+.1f}% predicted time"
            assert slower >= 0
        else:
            needed, allowed = list(numbers(re.sub(r"sm_\d+a?|m\d+n\d+k\d+", "", why)))[:2]
            assert needed > allowed or needed % allowed
    assert seen == {"tile_q", "tile_kv", "stages"}


def test_the_binding_constraint() -> None:
    """d256 on Hopper: shared memory stops tile_kv, as every hand-written kernel found."""
    spec = make_spec(head_dim=(256, 256), heads=(8, 8), mask="full", batch=1, seqlen=(16384, 16384))
    why = rank(spec, H200, tunings=()).best.why
    assert why.binding == "shared memory: tile_kv <= 80"
    assert dict(why.slack)["shared memory"] == "231,424 / 232,448 B of shared memory"
    assert dict(why.rejected)["tile_kv=96"] == "needs 264,192 B of shared memory; sm_90a allows 232,448"


# -- plans as data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_round_trip_through_json(model: str) -> None:
    plan = solve(make_spec(**MODELS[model]), H200)
    again = plan_from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.why == plan.why


@pytest.mark.parametrize(
    "bound",
    [
        Q,
        Q - 4095,
        sympy.Max(0, Q - 7),
        128 * sympy.floor(Q / 128),
        sympy.floor((2 * Q + 1) / 3),
        sympy.Min(Q + 2, SEQLEN_KV - 2),
        sympy.Max(Q, sympy.floor((SEQLEN_KV - 5) / 4) * 4 + 3),
    ],
)
def test_bounds_survive_as_text(bound: sympy.Expr) -> None:
    plan = solve(make_spec(), H200)
    plan = dataclasses.replace(plan, mask=MaskPlan.of_bounds("causal", RowBounds(None, bound)))
    assert plan_from_dict(plan.to_dict()).mask.bounds.last == bound


def test_a_hopper_plan_survives() -> None:
    plan = solve(make_spec(), H200)
    assert plan_from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    "damage",
    [
        {"tile_q": None},
        {"family": "sm70"},
        {"mask": None},
        {"schedule": {"warp_speed": True}},
        {"extra": 1},
        {"kernel": "attn_fwd_other"},
        {"mask": {"label": "full", "condition": "__import__('os')", "route": "bounds", "over": []}},
        {"score": {"label": "", "expr": "__import__('os')"}},
        {"tensors": [{"name": "doc"}]},
        {"parameters": [{"name": "cap", "kind": "float", "most": 3}]},
    ],
)
def test_a_damaged_plan_is_refused(damage: dict[str, Any]) -> None:
    data = solve(make_spec(), H200).to_dict() | damage
    if data["tile_q"] is None:
        del data["tile_q"]
    with pytest.raises(PlanError, match="not a plan"):
        plan_from_dict(data)


def test_validate_refuses_what_the_chip_or_the_tiles_contradict() -> None:
    plan = solve(make_spec(), H200)
    validate(plan, H200)
    with pytest.raises(PlanError, match="for sm_90a, not for sm_80"):
        validate(plan, ARCHS["sm_80"])
    with pytest.raises(PlanError, match=r"needs .* registers per thread"):
        validate(dataclasses.replace(plan, tile_kv=512), H200)
    with pytest.raises(PlanError, match="smem_bytes=1, but its tiles imply"):
        validate(dataclasses.replace(plan, smem_bytes=1), H200)


def test_ranking_is_json() -> None:
    data = rank(make_spec(), H200).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["candidates"][0]["plan"]["why"]["binding"]
