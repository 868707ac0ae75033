"""What is proposed compiles as promised: no spills, no warning of ptxas, the planned shared memory.

The registers beside the accumulators are what the plan knows only from the compiler, so the proposals nearest
to a register limit are compiled, beside the ones that are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flashgen.arch import ARCHS
from flashgen.plan import KernelPlan, Sm90Schedule, rank
from flashgen.plan.tuned import SHIPPED, read
from flashgen.spec import AttentionSpec, load_spec

ROOT = Path(__file__).resolve().parent.parent
H200 = ARCHS["sm_90a"]


def edges(spec: AttentionSpec) -> Iterator[KernelPlan]:
    """For each number of warpgroups and each use of the Q buffers, the proposal with the fewest registers
    left.
    """
    tightest: dict[tuple[int, int, bool], KernelPlan] = {}
    for candidate in rank(spec, H200, tunings=()).candidates:
        plan = candidate.plan
        if not isinstance(plan.schedule, Sm90Schedule):
            continue
        key = (plan.warps, plan.schedule.q_stages, plan.schedule.o_aliases_q)
        left = plan.schedule.consumer_registers - plan.registers
        kept = tightest.get(key)
        if kept is None or left < kept.schedule.consumer_registers - kept.registers:  # type: ignore[union-attr]
            tightest[key] = plan
    yield from tightest.values()


def plans() -> Iterator[KernelPlan]:
    specs = [load_spec(path) for path in sorted((ROOT / "specs").glob("*.yaml"))]
    for spec in specs:
        ranking = rank(spec, H200)
        yield ranking.best
        yield ranking.candidates[0].plan
    for spec in specs:
        yield from edges(spec)


def tuned() -> Iterator[KernelPlan]:
    for path in SHIPPED.glob("*.json"):
        file = read(path)
        assert file is not None
        for e in file.entries:
            spec = AttentionSpec(
                name="tuned",
                attention={
                    "heads": 8,
                    "head_dim": {"qk": e.head_dim_qk, "v": e.head_dim_v},
                    "mask": {"window": 1024} if e.mask == "window" else e.mask,
                },
                tiles={"q": e.tile_q, "kv": e.tile_kv, "stages": e.stages, "warps": e.warps,
                       "schedule": {"family": e.family, **e.schedule}},
            )  # fmt: skip
            yield rank(spec, ARCHS[file.target]).best


def distinct(found: Iterator[KernelPlan]) -> list[KernelPlan]:
    """Plans that differ in more than names, the number of heads, the scale and the dtype."""
    seen = {}
    for plan in found:
        alike = replace(plan, spec="", scale=1.0, dtype="bf16", group=1 if plan.group == 1 else 2)
        seen.setdefault(alike, plan)
    return list(seen.values())


def plan_id(plan: KernelPlan) -> str:
    own = f"{plan.mask.label}-d{plan.head_dim_qk}-{plan.tile_q}x{plan.tile_kv}-{plan.stages}"
    schedule = plan.schedule
    if isinstance(schedule, Sm90Schedule):
        own += f"-q{schedule.q_stages}{'-o' if not schedule.o_aliases_q else ''}"
    return own


PLANS = distinct(plans())


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize("plan", [*PLANS, *distinct(tuned())], ids=plan_id)
def test_what_is_proposed_compiles_without_spills(plan: KernelPlan) -> None:
    from flashgen.build import build, mismatches

    resources = build(plan, on_mismatch="raise").resources
    assert mismatches(plan, resources) == ()
    assert resources.spill_bytes == 0 and resources.stack_bytes == 0
    assert resources.smem_bytes == plan.smem_bytes
    if isinstance(plan.schedule, Sm90Schedule):
        allotted = min(H200.max_registers_per_thread, H200.registers_per_sm // plan.threads) // 8 * 8
        assert resources.registers <= allotted
