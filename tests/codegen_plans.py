"""Plans written by hand, so that printing and compiling are tested without the solver."""

from __future__ import annotations

from typing import Any

from flashgen.plan.model import KernelPlan, MaskPlan, Sm80Schedule
from flashgen.spec.bounds import RowBounds
from flashgen.spec.symbols import Q

BOUNDS = {
    "full": RowBounds(None, None),
    "causal": RowBounds(None, Q),
    "window1024": RowBounds(Q - 1023, Q),
    "future": RowBounds(Q, None),
}


def pitch(head_dim: int) -> int:
    """Elements per row of a shared tile, as docs/architecture.md has it."""
    columns = -(-head_dim // 16) * 16
    return columns if columns % 64 == 0 else columns + 8


def sm80_plan(
    head_dim: int | tuple[int, int] = 128,
    tile_q: int = 128,
    tile_kv: int = 64,
    warps: int = 4,
    *,
    stages: int = 1,
    blocks: int = 2,
    q_in_registers: bool = False,
    mask: str = "causal",
    **rest: Any,
) -> KernelPlan:
    """A plan of the sm80 family; `rest` overrides any other field."""
    qk, v = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    q, o = 2 * tile_q * pitch(qk), 2 * tile_q * pitch(v)
    kv = 2 * stages * tile_kv * (pitch(qk) + pitch(v))
    fields: dict[str, Any] = {
        "spec": "by-hand",
        "family": "sm80",
        "target": "sm_80",
        "dtype": "bf16",
        "group": 1,
        "align": "bottom_right",
        "scale": qk**-0.5,
        "registers": 255,
        "smem_bytes": max(q, kv, o) if q_in_registers else max(q, o) + kv,
    }
    return KernelPlan(
        head_dim_qk=qk,
        head_dim_v=v,
        mask=MaskPlan.of_bounds(mask, BOUNDS[mask]),
        tile_q=tile_q,
        tile_kv=tile_kv,
        stages=stages,
        warps=warps,
        schedule=Sm80Schedule(q_in_registers),
        blocks_per_sm=blocks,
        **(fields | rest),
    )


# One for each structural choice of the template, and the head dims of the shipped specs.
SM80_PLANS = [
    sm80_plan(64, 128, 128),
    sm80_plan(64, 128, 64, stages=2, mask="window1024", dtype="fp16"),
    sm80_plan(64, 128, 64, 8, blocks=1, q_in_registers=True, mask="full"),
    sm80_plan(80, mask="full", align="top_left"),
    sm80_plan(96, stages=2, align="top_left"),
    sm80_plan(128, group=4),
    sm80_plan(128, stages=2, mask="full"),
    sm80_plan(128, 128, 64, 8, stages=2, blocks=1, q_in_registers=True),
    sm80_plan(160, 128, 64, 8, blocks=1),
    sm80_plan(192, 128, 64, 8, blocks=1, mask="future"),
    sm80_plan((192, 128), 128, 64, 8, stages=2, blocks=1, group=2),
    sm80_plan(256, 128, 64, 8, blocks=1, dtype="fp16"),
    sm80_plan(256, 64, 32, 4, blocks=2, mask="window1024"),
    sm80_plan(8, 64, 64, 4, mask="full"),
    sm80_plan(72, stages=3, blocks=1),
]


def plan_id(plan: KernelPlan) -> str:
    """Short and unique among the plans above."""
    return f"{plan.kernel}-{plan.tile_q}x{plan.tile_kv}w{plan.warps}s{plan.stages}"
