"""What was derived from a plan's mask, and what it leaves to do: in words, and in shares of tiles."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from flashgen.plan.coverage import Basis
from flashgen.plan.model import KernelPlan, MaskPlan, Sm90Schedule
from flashgen.plan.workload import Workload
from flashgen.spec.bounds import RowBounds
from flashgen.spec.derivation import Route
from flashgen.spec.printer import to_text


@dataclass(frozen=True)
class MaskExplanation:
    """The mask of a plan over a workload. Shares are of all tiles of a head."""

    condition: str
    route: Route
    reason: str  # the route in words
    keys: tuple[tuple[str, str], ...]  # first and last key that a row keeps, in each interval
    residual: str  # what is tested element by element beside them; "true": nothing
    basis: Basis  # what the shares rest on
    tiles: int
    skipped: float
    full: float
    partial: float

    @property
    def caveat(self) -> str:
        """Of the shares, where they do not hold for every call."""
        if self.basis == "sample":
            return "with the gallery's samples of the mask's tensors"
        if self.basis == "hull":
            return "at most so many: what depends on tensors and parameters of the call is taken to be kept"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `flashgen plan --json`."""
        return asdict(self) | {"keys": [list(interval) for interval in self.keys]}


def explain_mask(plan: KernelPlan, work: Workload) -> MaskExplanation:
    """What the mask's derivation comes to on a workload, with the plan's tiles."""
    mask, derived = plan.mask, plan.mask.derivation
    rows = positions(plan)
    visited, masked = work.coverage.mean_tiles(rows, plan.tile_kv)
    tiles = -(-work.seqlen_q // rows) * -(-work.seqlen_kv // plan.tile_kv)
    segments = derived.segments if derived.ranges is None else (derived.ranges.bounds,)
    return MaskExplanation(
        condition=to_text(mask.condition),
        route=derived.route,
        reason=_reason(mask),
        keys=tuple(_keys(mask, segment) for segment in segments),
        residual=to_text(derived.residual),
        basis=work.coverage.basis,
        tiles=tiles,
        skipped=float(1 - visited / max(tiles, 1)),
        full=float((visited - masked) / max(tiles, 1)),
        partial=float(masked / max(tiles, 1)),
    )


def positions(plan: KernelPlan) -> int:
    """Of the queries in a q tile, which may hold several heads of each."""
    packed = isinstance(plan.schedule, Sm90Schedule) and plan.schedule.pack_gqa
    return plan.tile_q // plan.group if packed else plan.tile_q


def _reason(mask: MaskPlan) -> str:
    derived = mask.derivation
    if derived.route == "map":
        return "before the launch, a kernel tests every element and lists the tiles to visit"
    if derived.ranges is not None:
        names = sorted({search.read.func.__name__ for search in derived.ranges.searches})
        return f"before the launch, a kernel searches {' and '.join(names)} for each row's first and last key"
    if mask.keeps_all:
        return "every row keeps every key"
    if mask.listed:
        return f"each row keeps up to {len(derived.segments)} intervals of keys, in closed form"
    return "each row keeps one interval of keys, in closed form"


def _keys(mask: MaskPlan, segment: RowBounds) -> tuple[str, str]:
    first = "0" if segment.first is None else to_text(segment.first)
    last = "seqlen_kv - 1" if segment.last is None else to_text(segment.last)
    for search in mask.derivation.ranges.searches if mask.derivation.ranges is not None else ():
        found = f"(first kv with {to_text(search.read)} {search.relation} {to_text(search.value)})"
        whole_name = re.compile(rf"\b{search.result.name}\b")  # not a part of key_found10
        first, last = (found.join(whole_name.split(text)) for text in (first, last))
    return first, last


__all__ = ["MaskExplanation", "explain_mask", "positions"]
