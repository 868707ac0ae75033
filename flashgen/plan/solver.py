"""spec + arch -> plan: enumerate the legal lattice, cost each point, keep the best and say why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashgen.arch import Arch
from flashgen.errors import PlanError
from flashgen.plan.constraints import smem_and_registers, violations
from flashgen.plan.cost import Cost, cost, occupancy
from flashgen.plan.explain import explain, explain_tuned, impossible, reason
from flashgen.plan.lattice import family_and_given, legal
from flashgen.plan.model import KernelPlan
from flashgen.plan.tiling import Tiling
from flashgen.plan.tuned import TRUST, Tunings, adapted, find, tunings_for
from flashgen.plan.workload import Workload, head_of

if TYPE_CHECKING:
    from flashgen.spec import AttentionSpec


@dataclass(frozen=True)
class Candidate:
    """A legal plan and what it is predicted to cost."""

    plan: KernelPlan
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"plan": self.plan.to_dict(), "cost": dict(self.cost.terms())}


@dataclass(frozen=True)
class Ranking:
    """All legal plans for a spec on a chip, the cheapest first, and the measured one where there is one.

    Only the first and the measured one explain themselves.
    """

    candidates: tuple[Candidate, ...]
    tuned: Candidate | None = None

    @property
    def best(self) -> KernelPlan:
        """What `solve` gives: the measured plan, or else the one that the model puts first."""
        return (self.tuned or self.candidates[0]).plan

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `flashgen plan --all --json`."""
        return {
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "tuned": self.tuned.to_dict() if self.tuned else None,
        }


def rank(spec: AttentionSpec, arch: Arch, *, tunings: Sequence[Tunings] | None = None) -> Ranking:
    """Every legal tiling for the spec's workload, ranked by predicted time.

    Sizes and schedule fields given under `tiles:` are kept; the rest is solved for. `tunings` are looked up
    where nothing is given; None stands for the user's and the shipped ones.

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
    files = tunings_for(arch.target) if tunings is None else tunings
    tuned = _tuned(spec, workload, family.name, costs, files, arch) if given.nothing else None
    return Ranking(tuple(candidates), tuned)


def _tuned(
    spec: AttentionSpec,
    workload: Workload,
    family: str,
    costs: Mapping[Tiling, Cost],
    files: Sequence[Tunings],
    arch: Arch,
) -> Candidate | None:
    """The measured tiling for this workload, if it is legal and the model does not object."""
    found = find(files, workload)
    if found is None:
        return None
    entry, file = adapted(found[0], workload), found[1]
    tiling = entry.tiling
    if tiling.family != family or violations(tiling, workload.head, arch):
        return None
    own = cost(tiling, workload, arch)
    if own.seconds > (1 + TRUST) * min(other.seconds for other in costs.values()):
        return None
    why = explain_tuned(entry, file.gpu, {**costs, tiling: own}, workload, arch)
    return Candidate(replace(_plan(tiling, spec, workload, arch), why=why), own)


def solve(spec: AttentionSpec, arch: Arch) -> KernelPlan:
    """The best plan for a spec on a chip, with its reasons. Raises PlanError as `rank` does.

    Where the user left all tiles open and such a workload has been measured, it is the tuned one.
    """
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
    head = head_of(plan.head_dim_qk, plan.head_dim_v, plan.group, plan.mask, plan.score, sink=plan.sink)
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
        mask=workload.mask,
        score=workload.score,
        tensors=workload.tensors,
        parameters=workload.parameters,
        sink=workload.sink,
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
