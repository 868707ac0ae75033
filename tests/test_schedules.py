"""Every choice of an sm90 schedule that the solver does not make by itself, asked for under `tiles`."""

from __future__ import annotations

from typing import Any

import pytest
from attention_cases import Case

from flashgen.arch import arch
from flashgen.build import compile_source
from flashgen.codegen import render
from flashgen.codegen.elements import elements
from flashgen.errors import PlanError
from flashgen.plan import solve
from flashgen.plan.operations import is_capped

MASKS: tuple[Any, ...] = ("full", "causal", {"window": 300})
CHOICES: tuple[dict[str, Any], ...] = (
    {"p_in_registers": False},
    {"overlap": False},
    {"ping_pong": False},
    {"cluster": 2},
    {"cluster": 2, "reference": "first", "o_buffer": "v", "q_stages": 1},
    {"cluster": 2, "reference": "first", "q_stages": 2},
    {"cluster": 2, "reference": "first", "key_order": "ascending", "tile_order": "static"},
    {"pack_gqa": True},
    {"key_order": "ascending"},
    {"q_register_steps": 3},
    {"q_register_steps": 4, "reference": "first", "output_wait": "late"},
    {"edge_tiles": "apart"},
    {"reference": "first"},
    {"reference": "first", "rescale": "late", "key_order": "ascending", "o_buffer": "q"},
    {"reference": "first", "output_wait": "early"},
    {"reference": "first", "output_wait": "late", "tile_order": "static", "q_stages": 1},
    {"o_buffer": "v"},
    {"o_buffer": "v", "q_stages": 1, "ping_pong": False},
    {"o_buffer": "v", "q_stages": 1, "extra_v_stages": 1},
    {"o_buffer": "v", "q_stages": 1, "reference": "first", "key_order": "ascending"},
    {"output_wait": "early"},
    {"output_wait": "late", "rescale": "late"},
    {"tile_order": "static"},
    {"tile_order": "dynamic"},
    {"tile_order": "stream_k"},
    {"tile_order": "stream_k", "o_buffer": "q", "key_order": "ascending"},
    {"tile_order": "stream_k", "reference": "first"},
    {"tile_order": "stream_k", "reference": "first", "q_stages": 1, "o_buffer": "q", "output_wait": "late"},
    {"tile_order": "stream_k", "reference": "first", "o_buffer": "v"},
)
IMPOSSIBLE = {("full", "edge_tiles"), ("causal", "stream_k"), ("window", "stream_k")}


@pytest.mark.compiler
@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m if isinstance(m, str) else "window")
def test_choices_compile_without_spills(mask: Any, choice: dict[str, Any]) -> None:
    tiles = {"q": 128, "kv": 96, "schedule": {"family": "sm90", **choice}}
    case = Case(128, 128, group=4, mask=mask, seqlen_q=2048, seqlen_kv=2048, tiles=tiles)
    name = mask if isinstance(mask, str) else "window"
    if IMPOSSIBLE & {(name, word) for pair in choice.items() for word in pair}:
        with pytest.raises(PlanError, match="needs a mask"):
            solve(case.spec(), arch("sm_90a"))
        return
    plan = solve(case.spec(), arch("sm_90a"))
    assert all(getattr(plan.schedule, key) == value for key, value in choice.items())
    resources = compile_source(render(plan), plan.target, dynamic_smem=plan.smem_bytes).resources
    assert resources.spill_bytes == 0


@pytest.mark.compiler
@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m if isinstance(m, str) else "window")
def test_capped_scores_may_be_relative_to_their_first_tile(mask: Any) -> None:
    tiles = {"q": 128, "kv": 96, "schedule": {"family": "sm90", "reference": "first"}}
    case = Case(128, 128, group=4, mask=mask, score="softcap(30)", seqlen_q=2048, seqlen_kv=2048, tiles=tiles)
    plan = solve(case.spec(), arch("sm_90a"))
    resources = compile_source(render(plan), plan.target, dynamic_smem=plan.smem_bytes).resources
    assert resources.spill_bytes == 0


@pytest.mark.parametrize(
    ("score", "capped"),
    [
        ("softcap(30)", True),
        ("cap * tanh(score / cap)", True),
        ("tanh(score)", True),
        ("-tanh(score)", False),
        ("score", False),
        ("softcap(30) + kv", False),
        ("tanh(score + kv)", False),
        ("tanh(score) + tanh(2 * score)", False),
    ],
)
def test_plan_and_printer_agree_on_what_is_capped(score: str, capped: bool) -> None:
    params = {"cap": "runtime"} if "cap *" in score else {}
    case = Case(128, 128, mask="causal", score=score, params=params)
    plan = solve(case.spec(), arch("sm_90a"))
    printed = elements(plan).score
    assert is_capped(plan.score.expr) == capped == (printed is not None and printed.capped)


def test_heads_without_a_score_of_their_own_may_be_packed() -> None:
    case = Case(
        128, 128, group=4, mask="causal", score="score + table[q - kv]", seqlen_q=2048, seqlen_kv=2048,
        inputs={"table": {"index": ["q - kv"], "dtype": "fp32"}},
        tiles={"schedule": {"family": "sm90", "pack_gqa": True}},
    )  # fmt: skip
    plan = solve(case.spec(), arch("sm_90a"))
    assert (plan.schedule.pack_gqa, plan.schedule.distance_terms) == (True, "late")
