"""Which tilings are worth measuring: the best of the model's ranking, and what it does not tell apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product

from flashgen.arch import Arch
from flashgen.errors import PlanError
from flashgen.plan import Candidate, KernelPlan, Sm90Schedule, rank
from flashgen.spec import AttentionSpec
from flashgen.spec.model import Schedule, Tiles

SECTIONS_MIB = (16, 32, 64)  # of K and V; L2 holds some 50 MB
PER_TILE = 2  # schedules of one (tile_q, tile_kv) among the proposals
# Chosen by the solver to fit the rest of a schedule, so they are not carried over to a variant.
_DERIVED = ("producer_registers", "consumer_registers")


def proposals(spec: AttentionSpec, arch: Arch, top: int) -> list[Candidate]:
    """At most `top` candidates: the model's choice, what is tuned already, and the next ones of the ranking.

    Neighbours in the ranking are often one tile with other buffers, so no (tile_q, tile_kv) comes more than
    twice. Raises PlanError as `rank` does.
    """
    ranking = rank(spec, arch)
    tuned = () if ranking.tuned is None else (ranking.tuned,)
    chosen: dict[tuple[object, ...], Candidate] = {}
    taken: dict[tuple[int, int], int] = {}
    for candidate in (ranking.candidates[0], *tuned, *ranking.candidates):
        tile = (candidate.plan.tile_q, candidate.plan.tile_kv)
        key = tiling_of(candidate.plan)
        if key not in chosen and taken.get(tile, 0) < PER_TILE:
            taken[tile] = taken.get(tile, 0) + 1
            chosen[key] = candidate
    return list(chosen.values())[:top]


def variants(plan: KernelPlan, spec: AttentionSpec, arch: Arch) -> Iterator[Candidate]:
    """Legal neighbours of a plan: one choice changed that the model ranks equal, or nearly."""
    for change in _changes(plan):
        try:
            yield rank(changed(spec, plan, change), arch, tunings=()).candidates[0]
        except PlanError:  # one more stage, say, than fits
            continue


def changed(spec: AttentionSpec, plan: KernelPlan, change: Mapping[str, object]) -> AttentionSpec:
    """The spec with the tiles of `plan`, but for some of `q`, `kv`, `stages`, `warps` and schedule fields.

    Registers are chosen anew. Raises pydantic's ValidationError where a field or a value is none.
    """
    tiles: dict[str, object] = {
        "q": plan.tile_q, "kv": plan.tile_kv, "stages": plan.stages, "warps": plan.warps,
    }  # fmt: skip
    schedule = {name: value for name, value in asdict(plan.schedule).items() if name not in _DERIVED}
    tiles |= {name: value for name, value in change.items() if name in tiles}
    schedule |= {name: value for name, value in change.items() if name not in tiles}
    if "q" in change and "warps" not in change:
        tiles["warps"] = None
    given = Tiles.model_validate({**tiles, "schedule": Schedule(family=plan.family, **schedule)})
    return spec.model_copy(update={"tiles": given})


def _changes(plan: KernelPlan) -> Iterator[dict[str, object]]:
    schedule = plan.schedule
    if isinstance(schedule, Sm90Schedule):
        times = [("early", "early"), *product(("middle", "late"), ("early", "late"))]
        for output_wait, rescale in times:
            if (output_wait, rescale) != (schedule.output_wait, schedule.rescale):
                yield {"output_wait": output_wait, "rescale": rescale}
        if plan.warps >= 8:  # two warpgroups to take turns
            yield {"ping_pong": not schedule.ping_pong}
        if not (plan.mask.keeps_all or plan.mask.listed):
            yield {"key_order": "ascending" if schedule.key_order == "descending" else "descending"}
            if plan.mask.derivation.route == "bounds":
                yield {"edge_tiles": "inline" if schedule.edge_tiles == "apart" else "apart"}
        yield {"distance_terms": "early" if schedule.distance_terms == "late" else "late"}
        yield {"reference": "running" if schedule.reference == "first" else "first"}
        for order in ("static", "dynamic", *(("stream_k",) if plan.mask.keeps_all else ())):
            if order != schedule.tile_order:
                yield {"tile_order": order}
        if schedule.tile_order == "dynamic":
            for section_mib in SECTIONS_MIB:
                if section_mib != schedule.section_mib:
                    yield {"section_mib": section_mib}
        yield {"q_stages": 3 - schedule.q_stages} if schedule.q_stages < 3 else {"q_stages": 1}
        for buffer in ("q", "v", "own"):
            if buffer != schedule.o_buffer:
                yield {"o_buffer": buffer}
        yield {"cluster": 3 - schedule.cluster}
        yield {"q_register_steps": 0 if schedule.q_register_steps else 4}
        yield {"extra_v_stages": 0 if schedule.extra_v_stages else 1}
    yield {"stages": plan.stages + 1}
    step = 16 if plan.family == "sm90" else 32
    yield {"kv": plan.tile_kv + step}
    if plan.tile_kv > step:
        yield {"kv": plan.tile_kv - step}


def tiling_of(plan: KernelPlan) -> tuple[object, ...]:
    """What tells two plans of one spec apart."""
    return (plan.family, plan.tile_q, plan.tile_kv, plan.stages, plan.warps, plan.schedule)


__all__ = ["changed", "proposals", "tiling_of", "variants"]
