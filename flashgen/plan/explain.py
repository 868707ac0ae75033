"""Why a plan is what it is, and why there is none: constraints turned into sentences with both numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from flashgen.arch import Arch
from flashgen.errors import Location, PlanError, Problem
from flashgen.plan.constraints import (
    FAMILIES,
    MMA_DEPTH,
    Limit,
    Requirement,
    Usage,
    largest,
    usage,
    violations,
)
from flashgen.plan.cost import Cost
from flashgen.plan.lattice import TILE_KV_STEP, Given, lattice
from flashgen.plan.model import Explanation
from flashgen.plan.tiling import TILE_KV, UNKNOWNS, Tiling
from flashgen.plan.tuned import Tuned, variant
from flashgen.plan.workload import Workload

if TYPE_CHECKING:
    from flashgen.spec import AttentionSpec

# Field of a tiling -> its key under `tiles:`; the order in which an error looks for the user's part in it.
_KEYS: Mapping[str, str] = {"tile_kv": "kv", "tile_q": "q", "stages": "stages", "warps": "warps"}

# Symbol of the constraints -> the schedule's field that it is one value of, and the values that it can hurt
# with: O takes a buffer of its own where it is in neither of the others.
_ONE_OF: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "o_in_q": ("o_buffer", ("q", "own")),
    "o_in_v": ("o_buffer", ("v", "own")),
    "dynamic": ("tile_order", ("dynamic",)),
    "stream_k": ("tile_order", ("stream_k",)),
    "apart": ("edge_tiles", ("apart",)),
    "first": ("reference", ("first",)),
    "early_distances": ("distance_terms", ("early",)),
}


def reason(use: Usage, arch: Arch) -> str:
    """What a broken constraint says: ``needs 245,760 B of shared memory; sm_90a allows 232,448``."""
    constraint = use.constraint
    if isinstance(constraint, Requirement):
        return f"needs {constraint.needs}"
    if isinstance(constraint, Limit):
        allowed_by = {"chip": f"{arch.target} allows", "kernel": "the kernel takes", "tiling": "there are"}
        who = allowed_by[constraint.by]
        return f"needs {use.used:,} {constraint.needs}; {who} {use.allowed:,}"
    return f"gives {use.used}, which must be a multiple of {use.allowed} ({constraint.needs})"


def explain(
    best: Tiling, costs: Mapping[Tiling, Cost], workload: Workload, given: Given, arch: Arch
) -> Explanation:
    """The winner's binding constraint, the slack of all, and why each neighbour lost."""
    head = workload.head
    uses = usage(best, head, arch)
    return Explanation(
        binding=_binding(best, workload, given, arch),
        slack=tuple(
            (u.constraint.name, f"{u.used:,} / {u.allowed:,} {u.constraint.needs}")
            for u in uses
            if isinstance(u.constraint, Limit) and u.used
        ),
        rejected=tuple(_rejected(best, costs, workload, given, arch)),
        cost=costs[best].terms(),
        origin="given" if given.everything else "solved",
    )


def explain_tuned(
    entry: Tuned, gpu: str, costs: Mapping[Tiling, Cost], workload: Workload, arch: Arch
) -> Explanation:
    """Of a measured tiling: what was measured; slack and neighbours as for a solved one, by the model."""
    lengths = (
        f"{entry.seqlen_q}" if entry.seqlen_q == entry.seqlen_kv else f"{entry.seqlen_q}/{entry.seqlen_kv}"
    )
    correlation = (
        "" if entry.rank_correlation is None else f"rank correlation {entry.rank_correlation:+.2f}, "
    )
    others = _of_others(entry, workload)
    return replace(
        explain(entry.tiling, costs, workload, Given(), arch),
        origin="tuned",
        binding=f"measurement, the best of {entry.tried} tilings",
        measured=(
            ("measured", f"{entry.tflops:.0f} TFLOP/s at seqlen {lengths} on {gpu}{others}"),
            ("the model's ranking there", f"{correlation}its choice {100 * entry.regret:.1f}% slower"),
            ("source", entry.source),
        ),
    )


def _of_others(entry: Tuned, workload: Workload) -> str:
    """What was measured in place of this mask and score, where it was not they."""
    own = variant(workload)
    if entry.variant != own:
        return f", of {entry.mask} masks: {own} was not measured"
    return "" if own or workload.mask.label == entry.mask else f", of {entry.mask} masks"


def _binding(best: Tiling, workload: Workload, given: Given, arch: Arch) -> str:
    if given.kv is not None:
        return f"given: tile_kv = {given.kv}"
    family = FAMILIES[best.family]
    most, limit = largest(family, TILE_KV, best.values(workload.head, arch))
    if limit is not None and best.tile_kv + TILE_KV_STEP[best.family] > most:
        return f"{limit.name}: tile_kv <= {int(most)}"
    if limit is None:
        return "predicted time"
    return f"predicted time ({limit.name} would allow tile_kv <= {int(most)})"


def _rejected(
    best: Tiling, costs: Mapping[Tiling, Cost], workload: Workload, given: Given, arch: Arch
) -> list[tuple[str, str]]:
    """One step up and down on each axis that the user left open, the other two held."""
    points = list(lattice(FAMILIES[best.family], workload, given))
    entries = []
    for axis in ("tile_q", "tile_kv", "stages"):
        held = [name for name in ("tile_q", "tile_kv", "stages") if name != axis]
        line = [p for p in points if all(getattr(p, name) == getattr(best, name) for name in held)]
        here = getattr(best, axis)
        sizes = sorted({getattr(p, axis) for p in line})
        for size in [s for s in sizes if s < here][-1:] + [s for s in sizes if s > here][:1]:
            there = [p for p in line if getattr(p, axis) == size]
            entries.append((f"{axis}={size}", _against(best, there, costs, workload, arch)))
    return entries


def _against(
    best: Tiling, there: Sequence[Tiling], costs: Mapping[Tiling, Cost], workload: Workload, arch: Arch
) -> str:
    costed = [costs[p].seconds for p in there if p in costs]
    if costed:
        return f"{100 * (min(costed) / costs[best].seconds - 1):+.1f}% predicted time"
    head = workload.head
    nearest = min(there, key=lambda p: _excess(violations(p, head, arch)))
    return "; ".join(reason(use, arch) for use in violations(nearest, head, arch))


def impossible(spec: AttentionSpec, workload: Workload, given: Given, family: str, arch: Arch) -> PlanError:
    """The error for a lattice without a legal point: the constraints that its nearest point breaks."""
    head = workload.head
    nearest = min(
        lattice(FAMILIES[family], workload, given), key=lambda point: _excess(violations(point, head, arch))
    )
    return refusal(nearest, workload, given, arch, spec)


def refusal(tiling: Tiling, workload: Workload, given: Given, arch: Arch, spec: AttentionSpec) -> PlanError:
    """What a tiling breaks, each with both numbers, at the spec's line that asked for it."""
    head = workload.head
    problems = []
    for use in violations(tiling, head, arch):
        subject, location = _subject(use, tiling, given, spec)
        verb = reason(use, arch)
        if "," in subject:  # several sizes need, one size needs
            verb = verb.replace("needs", "need", 1).replace("gives", "give", 1)
        problems.append(Problem(f"{subject} {verb}", location, _hint(use, tiling, workload, arch)))
    return PlanError(problems)


def _subject(use: Usage, tiling: Tiling, given: Given, spec: AttentionSpec) -> tuple[str, Location | None]:
    """The user's own choices in a constraint, and where they stand; all its sizes where none is."""
    constraint = use.constraint
    symbols = {symbol.name for symbol in constraint.used.free_symbols | constraint.allowed.free_symbols}
    schedule = tiling.schedule
    chosen = {f.name: str(getattr(schedule, f.name)).lower() for f in fields(schedule)}
    spoken_of = {_field(symbol, chosen) for symbol in symbols}
    own: dict[str, Any] = {}
    paths: list[tuple[str, ...]] = []
    for name, key in _KEYS.items():
        if name in symbols and getattr(given, key) is not None:
            own[name] = getattr(given, key)
            paths.append((key,))
    for name in given.schedule:
        if name in spoken_of:
            own[name] = chosen[name]
            paths.append(("schedule", name))
    if not own:
        own = {s.name: getattr(tiling, s.name) for s in UNKNOWNS if s.name in symbols}
        own |= {name: value for name, value in chosen.items() if name in spoken_of}
    subject = ", ".join(f"{name}={value}" for name, value in own.items()) or "the head"
    return subject, spec.locate("tiles", *paths[0]) if paths else spec.locate("attention", "head_dim")


def _field(symbol: str, chosen: Mapping[str, str]) -> str | None:
    """The schedule's field that a constraint's symbol speaks of, where the chosen value has a part in it."""
    name, values = _ONE_OF.get(symbol, (symbol, ()))
    if name not in chosen or chosen[name] == "0":
        return None
    return name if not values or chosen[name] in values else None


def _hint(use: Usage, tiling: Tiling, workload: Workload, arch: Arch) -> str | None:
    if not isinstance(use.constraint, Limit) or not use.constraint.used.has(TILE_KV):
        return None
    most, _ = largest(FAMILIES[tiling.family], TILE_KV, tiling.values(workload.head, arch))
    beside = f"tile_q={tiling.tile_q}, stages={tiling.stages}, warps={tiling.warps}"
    fitting = int(max(most, 0)) // MMA_DEPTH * MMA_DEPTH
    while fitting > 0 and _breaks(use, replace(tiling, tile_kv=fitting), workload, arch):
        fitting -= MMA_DEPTH
    if fitting <= 0:
        return f"no tile_kv fits beside {beside}: lower those, or leave them to the solver"
    return f"the largest tile_kv that fits beside {beside} is {fitting}"


def _breaks(use: Usage, tiling: Tiling, workload: Workload, arch: Arch) -> bool:
    return use.constraint in [other.constraint for other in violations(tiling, workload.head, arch)]


def _excess(broken: Sequence[Usage]) -> float:
    """How far from legal: the relative overshoot of each limit; a wrong multiple counts as far."""
    return sum(
        u.used / max(u.allowed, 1) - 1 + 0.01 if isinstance(u.constraint, Limit) else 10.0 for u in broken
    )
