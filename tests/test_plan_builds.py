"""What is proposed compiles as promised: no spills, no warning of ptxas, the planned shared memory.

The registers beside the accumulators are what the plan knows only from the compiler, so the proposals nearest
to a register limit are compiled, beside the ones that are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from flashgen.arch import ARCHS
from flashgen.plan import KernelPlan, Sm90Schedule, Workload, rank
from flashgen.plan.tuned import SHIPPED, read
from flashgen.spec import AttentionSpec, load_spec

ROOT = Path(__file__).resolve().parent.parent
H200 = ARCHS["sm_90a"]


def plans() -> Iterator[KernelPlan]:
    """For each spec what is taken, what the model puts first, and for each number of warpgroups the proposal
    with the fewest registers left; that for each number of Q buffers, place of O and order of tiles too, once
    for all specs that are the same to the constraints.
    """
    tightest: dict[tuple[object, ...], KernelPlan] = {}
    for path in sorted((ROOT / "specs").glob("*.yaml")):
        spec = load_spec(path)
        ranking = rank(spec, H200)
        yield ranking.best
        yield ranking.candidates[0].plan
        head = replace(Workload.of(spec).head, group=1)
        for plan in [candidate.plan for candidate in ranking.candidates]:
            schedule = plan.schedule
            if isinstance(schedule, Sm90Schedule):
                choices = (schedule.q_stages, schedule.o_buffer, schedule.tile_order)
                for key in ((spec.name, plan.warps), *((head, plan.warps, choice) for choice in choices)):
                    if key not in tightest or registers_left(plan) < registers_left(tightest[key]):
                        tightest[key] = plan
    yield from tightest.values()


def registers_left(plan: KernelPlan) -> int:
    assert isinstance(plan.schedule, Sm90Schedule)
    return plan.schedule.consumer_registers - plan.registers


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


def elementwise() -> Iterator[KernelPlan]:
    """Of wide heads with masks that are tested element by element, which no spec of the gallery has."""
    for mask in ("natten_2d(64, 128, 7)", "causal and (q // 3 - kv // 3) % 5 < 2"):
        for head_dim in (192, 256):
            spec = AttentionSpec(
                name="tested",
                attention={"heads": 8, "head_dim": head_dim, "mask": mask},
                workload={"seqlen": 8192},
            )
            for candidate in rank(spec, H200, tunings=()).candidates[:2]:
                yield candidate.plan


def capped() -> Iterator[KernelPlan]:
    """With a softcap and the running maximum, which no spec of the gallery has: of the first proposals that
    with the fewest registers left, and where O is awaited late, of all.
    """
    document = {
        "mask": "document",
        "tensors": {"doc": {"index": ["batch", "kv"], "dtype": "int32", "sorted": True}},
    }
    for mask in (document, {"mask": "causal", "dtype": "fp16"}, {"mask": {"window": 128}, "dtype": "fp16"}):
        for head_dim in (128, 224, 256):
            for late in (False, True):
                schedule = {"reference": "running", **({"output_wait": "late"} if late else {})}
                spec = AttentionSpec(
                    name="capped",
                    attention={"heads": 8, "head_dim": head_dim, "score": "softcap(30)", **mask},
                    workload={"seqlen": 8192},
                    tiles={"schedule": {"family": "sm90", **schedule}},
                )
                candidates = rank(spec, H200, tunings=()).candidates
                found = [candidate.plan for candidate in (candidates if late else candidates[:4])]
                yield min(found, key=registers_left)


def drawn_windows() -> Iterator[KernelPlan]:
    """Of windows, whose producer draws its tiles and has one buffer to fill."""
    for head_dim in (64, 128):
        schedule = {"q_stages": 1, "o_buffer": "q", "tile_order": "dynamic", "reference": "running"}
        spec = AttentionSpec(
            name="drawn",
            attention={"heads": 8, "head_dim": head_dim, "mask": {"window": 128}},
            tiles={"q": 128, "kv": 64, "stages": 2, "schedule": {"family": "sm90", **schedule}},
        )
        yield rank(spec, H200, tunings=()).best


def distinct(found: Iterable[KernelPlan]) -> list[KernelPlan]:
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
        own += f"-q{schedule.q_stages}-o-{schedule.o_buffer}"
    return own


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", distinct(chain(plans(), tuned(), elementwise(), capped(), drawn_windows())), ids=plan_id
)
def test_what_is_proposed_compiles_without_spills(plan: KernelPlan) -> None:
    from flashgen.build import build, mismatches

    resources = build(plan, on_mismatch="raise").resources
    assert mismatches(plan, resources) == ()
    assert resources.spill_bytes == 0 and resources.stack_bytes == 0
    assert resources.smem_bytes == plan.smem_bytes
    if isinstance(plan.schedule, Sm90Schedule):
        allotted = min(H200.max_registers_per_thread, H200.registers_per_sm // plan.threads) // 8 * 8
        assert resources.registers <= allotted
