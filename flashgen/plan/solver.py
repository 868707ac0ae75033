"""spec + arch -> plan: enumerate the legal lattice, cost each point, keep the best and say why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashgen.arch import Arch
from flashgen.errors import PlanError
from flashgen.plan.constraints import smem_and_registers, violations
from flashgen.plan.cost import Cost, cost, occupancy
from flashgen.plan.explain import explain, impossible, reason
from flashgen.plan.lattice import family_and_given, legal
from flashgen.plan.model import KernelPlan, MaskPlan
from flashgen.plan.tiling import Head, Tiling
from flashgen.plan.workload import Workload

if TYPE_CHECKING:
    from flashgen.spec import AttentionSpec


@dataclass(frozen=True)
class Candidate:
    """A legal plan and what it is predicted to cost."""

    plan: KernelPlan
    cost: Cost


@dataclass(frozen=True)
class Ranking:
    """All legal plans for a spec on a chip, the cheapest first. Only the first explains itself."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> KernelPlan:
        return self.candidates[0].plan

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `flashgen plan --all --json`."""
        return {
            "candidates": [
                {"plan": candidate.plan.to_dict(), "cost": dict(candidate.cost.terms())}
                for candidate in self.candidates
            ]
        }


def rank(spec: AttentionSpec, arch: Arch) -> Ranking:
    """Every legal tiling for the spec's workload, ranked by predicted time.

    Sizes and schedule fields given under `tiles:` are kept; the rest is solved for.

    Raises:
        PlanError: nothing fits; names each broken constraint with what is needed and what the chip allows.
    """
    family, given = family_and_given(spec, arch)
    workload = Workload.of(spec)
    costs = {tiling: cost(tiling, workload, arch) for tiling in legal(family, workload, given, arch)}
    if not costs:
        raise impossible(spec, workload, given, family.name, arch)
    # Equal times: the smaller footprint, then the lattice's own order, so that every machine decides alike.
    order = sorted(costs, key=lambda t: (costs[t].seconds, _footprint(t, workload, arch)))
    candidates = [Candidate(_plan(t, spec, workload, arch), costs[t]) for t in order]
    why = explain(order[0], costs, workload, given, arch)
    candidates[0] = replace(candidates[0], plan=replace(candidates[0].plan, why=why))
    return Ranking(tuple(candidates))


def solve(spec: AttentionSpec, arch: Arch) -> KernelPlan:
    """The best plan for a spec on a chip, with its reasons. Raises PlanError as `rank` does."""
    return rank(spec, arch).best


def validate(plan: KernelPlan, arch: Arch) -> None:
    """Hold a plan against the chip's constraints and against its own predictions.

    For plans that come from elsewhere than `solve`: a file, a tuning table, a user's hand.

    Raises:
        PlanError: a constraint is broken, the plan is another chip's, or its tiles imply other sizes.
    """
    if plan.target != arch.target:
        raise PlanError(f"the plan is for {plan.target}, not for {arch.target}")
    tiling = Tiling(plan.family, plan.tile_q, plan.tile_kv, plan.stages, plan.warps, plan.schedule)
    head = Head(plan.head_dim_qk, plan.head_dim_v, plan.group, has_first=plan.mask.bounds.first is not None)
    if broken := violations(tiling, head, arch):
        sizes = f"tile_q={plan.tile_q}, tile_kv={plan.tile_kv}, stages={plan.stages}, warps={plan.warps}"
        raise PlanError("; ".join(f"{sizes}: {reason(use, arch)}" for use in broken))
    smem, registers = smem_and_registers(tiling, head, arch)
    implied = {"smem_bytes": smem, "registers": registers, "blocks_per_sm": occupancy(tiling, head, arch)}
    for name, value in implied.items():
        if getattr(plan, name) != value:
            raise PlanError(f"the plan says {name}={getattr(plan, name):,}, but its tiles imply {value:,}")


def _footprint(tiling: Tiling, workload: Workload, arch: Arch) -> tuple[int, int]:
    return smem_and_registers(tiling, workload.head, arch)


def _plan(tiling: Tiling, spec: AttentionSpec, workload: Workload, arch: Arch) -> KernelPlan:
    head = workload.head
    smem, registers = smem_and_registers(tiling, head, arch)
    return KernelPlan(
        spec=spec.name,
        family=tiling.family,
        target=arch.target,
        dtype=workload.dtype,
        head_dim_qk=workload.head_dim_qk,
        head_dim_v=workload.head_dim_v,
        group=workload.heads_q // workload.heads_kv,
        align=workload.align,
        mask=MaskPlan(spec.attention.mask.label, workload.bounds),
        scale=spec.scale,
        tile_q=tiling.tile_q,
        tile_kv=tiling.tile_kv,
        stages=tiling.stages,
        warps=tiling.warps,
        schedule=tiling.schedule,
        smem_bytes=smem,
        registers=registers,
        blocks_per_sm=occupancy(tiling, head, arch),
    )
