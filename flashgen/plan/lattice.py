"""The tilings worth considering: the axes of each family, and what the user fixed on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from flashgen.arch import Arch
from flashgen.errors import PlanError, Problem
from flashgen.plan.constraints import (
    FAMILIES,
    MMA_DEPTH,
    PANEL_COLUMNS,
    REGISTER_SPLITS,
    Family,
    largest,
    violations,
)
from flashgen.plan.model import ScorePlan, Sm80Schedule, Sm90Schedule
from flashgen.plan.tiling import TILE_KV, Head, Tiling, padded, producer_need
from flashgen.plan.workload import Workload
from flashgen.spec.suggest import did_you_mean, quoted

if TYPE_CHECKING:
    from flashgen.spec import AttentionSpec

# The preferred first: an arch takes the first whose features it has.
AVAILABLE_FAMILIES: tuple[Literal["sm80", "sm90"], ...] = ("sm90", "sm80")

# An odd number of 16-key blocks is legal on sm80, but costs it some 20 registers (NVRTC 13.0): it pairs them.
TILE_KV_STEP: Mapping[str, int] = MappingProxyType({"sm80": 32, "sm90": 16})
TILE_KV_MAX = 256
# (tile_q, warps): one or two m16 fragments of rows in each warp; more spill. From 16 warps on, a thread has
# at most 128 registers; below 4, a scheduler has nothing to do.
SM80_ROWS = ((64, 4), (128, 4), (128, 8), (256, 8))
SM80_FRAGMENTS = (1, 2)
SM80_STAGES = (1, 2, 3, 4)
SM90_WARPGROUPS = (1, 2, 3, 4)
# From this head_dim_v on, O is rescaled beside the next Q K^T: 3% at d256 (H200). With a score or a test of
# elements it spills.
WIDE_V = 192
O_BUFFERS: tuple[Literal["own", "v", "q"], ...] = ("own", "v", "q")
SM90_STAGES = (2, 3)  # one buffer cannot be filled while it is read; a user may still ask for it, or for more


@dataclass(frozen=True)
class Given:
    """What the user fixed under `tiles:`; None and absent fields are the solver's to choose."""

    q: int | None = None
    kv: int | None = None
    stages: int | None = None
    warps: int | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nothing(self) -> bool:
        """Whether all is left to the solver, or to what was measured."""
        return (self.q, self.kv, self.stages, self.warps) == (None,) * 4 and not self.schedule

    @property
    def everything(self) -> bool:
        """Whether no tile size is left to solve for."""
        return None not in (self.q, self.kv, self.stages, self.warps)


def family_and_given(spec: AttentionSpec, arch: Arch) -> tuple[Family, Given]:
    """The kernel family for a spec on a chip, and the user's own choices, checked against its fields.

    Raises:
        PlanError: the chip lacks what the family needs, or has no such schedule field.
    """
    asked = dict(spec.tiles.schedule)
    name = asked.pop("family", None)
    at = spec.locate("tiles", "schedule", "family")
    if name is None:
        name = next(f for f in AVAILABLE_FAMILIES if FAMILIES[f].features <= arch.features)
    family = FAMILIES[name]
    if missing := sorted(family.features - arch.features):
        raise PlanError(
            f"family {name} needs {', '.join(missing)}, which {arch.target} lacks",
            location=at,
            hint="leave out tiles.schedule.family to get the one for this chip",
        )
    known = [f.name for f in fields(family.schedule)]
    problems = [
        Problem(
            f"family {family.name} has no schedule field {quoted(field_name)}",
            spec.locate("tiles", "schedule", field_name),
            did_you_mean(field_name, known, known),
        )
        for field_name in asked
        if field_name not in known
    ]
    if problems:
        raise PlanError(problems)
    tiles = spec.tiles
    return family, Given(tiles.q, tiles.kv, tiles.stages, tiles.warps, MappingProxyType(asked))


def lattice(family: Family, workload: Workload, given: Given) -> Iterator[Tiling]:
    """Every point, legal or not, in a fixed order; what the user gave is kept as it is."""
    step = TILE_KV_STEP[family.name]
    axis = (given.kv,) if given.kv is not None else range(step, TILE_KV_MAX + 1, step)
    for stem in _stems(family, workload, given):
        for tile_kv in axis:
            yield replace(stem, tile_kv=tile_kv)


def legal(family: Family, workload: Workload, given: Given, arch: Arch) -> Iterator[Tiling]:
    """The legal points. `tile_kv` runs only up to the bound that the constraints solve to, in the family's
    steps; where no tile of a whole step fits, in those of one mma.
    """
    for step in dict.fromkeys((TILE_KV_STEP[family.name], MMA_DEPTH)):
        tilings = list(_legal(family, workload, given, arch, step))
        if tilings:
            yield from tilings
            return


def _legal(family: Family, workload: Workload, given: Given, arch: Arch, step: int) -> Iterator[Tiling]:
    head = workload.head
    for stem in _stems(family, workload, given):
        if given.kv is not None:
            axis: tuple[int, ...] | range = (given.kv,)
        else:
            most, _ = largest(family, TILE_KV, stem.values(head, arch))
            axis = range(step, int(max(0, min(most, TILE_KV_MAX))) + 1, step)
        for tile_kv in axis:
            tiling = replace(stem, tile_kv=tile_kv)
            if not violations(tiling, head, arch):
                yield tiling


def _stems(family: Family, workload: Workload, given: Given) -> Iterator[Tiling]:
    """Points without their tile_kv (it stands at one step)."""
    for (tile_q, warps), stages in product(_rows(family, given), _stages(family, given)):
        for schedule in _schedules(family, workload, tile_q, warps, given):
            yield Tiling(family.name, tile_q, TILE_KV_STEP[family.name], stages, warps, schedule)


def _rows(family: Family, given: Given) -> list[tuple[int, int]]:
    """(tile_q, warps) pairs."""
    if given.q is not None and given.warps is not None:
        return [(given.q, given.warps)]
    if family.name == "sm90":
        if given.q is not None:
            return [(given.q, padded(max(given.q, 1), 64) // 16)]
        warps = (given.warps,) if given.warps is not None else tuple(4 * wg for wg in SM90_WARPGROUPS)
        return [(16 * w, w) for w in warps]
    if given.warps is not None:
        return [(16 * given.warps * fragments, given.warps) for fragments in SM80_FRAGMENTS]
    if given.q is None:
        return list(SM80_ROWS)
    pairs = [(given.q, given.q // (16 * m)) for m in SM80_FRAGMENTS if given.q % (16 * m) == 0]
    return pairs or [(given.q, 1)]


def _stages(family: Family, given: Given) -> tuple[int, ...]:
    if given.stages is not None:
        return (given.stages,)
    return SM80_STAGES if family.name == "sm80" else SM90_STAGES


def _schedules(
    family: Family, workload: Workload, tile_q: int, warps: int, given: Given
) -> list[Sm80Schedule | Sm90Schedule]:
    if family.name == "sm80":
        options = [Sm80Schedule(q_in_registers=choice) for choice in (False, True)]
        return list(dict.fromkeys(replace(option, **given.schedule) for option in options))
    return list(dict.fromkeys(_sm90_schedules(workload, max(1, warps // 4), given)))


def _sm90_schedules(workload: Workload, warpgroups: int, given: Given) -> Iterator[Sm90Schedule]:
    """What measured well on an H200. P in shared memory, no overlap, clusters, other orders are there to be
    asked for under `tiles.schedule`, and `flashgen tune` tries some; none was ahead everywhere.
    """
    head, asked = workload.head, given.schedule
    uneven = not workload.mask.keeps_all
    plain = head.closed_form and workload.score == ScorePlan()
    packable = head.group > 1 and PANEL_COLUMNS % head.group == 0 and head.closed_form and head.heads_alike
    # Packing pays where the positions of one head do not fill the rows of a block: decoding, not prefill.
    short = workload.seqlen_q < PANEL_COLUMNS * warpgroups
    packed = asked.get("pack_gqa", short and packable and asked.get("distance_terms") != "early")
    first = workload.first_reference_by_default and asked.get("overlap", True)
    first = first and asked.get("reference", "first") == "first"
    orders: tuple[Literal["dynamic", "static", "stream_k"], ...] = ("static", "stream_k")
    if uneven:
        orders = ("dynamic",)
    for q_stages, o_buffer, tile_order in product((2, 1), O_BUFFERS, orders):
        schedule = Sm90Schedule(
            ping_pong=warpgroups > 1,
            q_stages=q_stages,
            rescale="late" if head.dim_v >= WIDE_V and plain else "early",
            tile_order=tile_order,
            reference="first" if first else "running",
            pack_gqa=packed,
            o_buffer=o_buffer,
        )
        chosen = workload.score_choices if first and not packed else {}
        yield with_registers(replace(schedule, **{**chosen, **asked}), head, warpgroups, asked)


def with_registers(
    schedule: Sm90Schedule, head: Head, warpgroups: int, given: Mapping[str, Any]
) -> Sm90Schedule:
    """The schedule with the first register split that its producer can live with; `given` ones are kept."""
    splits = REGISTER_SPLITS.get(warpgroups, REGISTER_SPLITS[max(REGISTER_SPLITS)])
    need = producer_need(head, schedule)
    producer, consumer = next((split for split in splits if split[0] >= need), splits[-1])
    return replace(
        schedule,
        producer_registers=given.get("producer_registers", producer),
        consumer_registers=given.get("consumer_registers", consumer),
    )
