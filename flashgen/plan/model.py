"""`KernelPlan`: everything that is decided about one kernel, and why.

A plan is the *only* thing a template may see. It is frozen and hashable; `why` takes no part in
equality or in the source, so two solvers that reach the same tiling print the same kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sympy import And, Expr, Ge, Le
from sympy.logic.boolalg import Boolean

from flashgen.errors import PlanError
from flashgen.spec.bounds import RowBounds
from flashgen.spec.derivation import MaskDerivation
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.symbols import KV, SCORE


@dataclass(frozen=True)
class Sm80Schedule:
    """Choices of the Ampere family (mma.sync, cp.async)."""

    q_in_registers: bool = False  # Q fragments are loaded once; K and V then reuse Q's shared memory


@dataclass(frozen=True)
class Sm90Schedule:
    """Choices of the Hopper family (TMA, WGMMA, warp specialisation)."""

    p_in_registers: bool = True  # P V from registers (RS); otherwise P goes through shared memory (SS)
    overlap: bool = True  # issue S_{j+1} = Q K^T before the softmax of S_j
    ping_pong: bool = True  # one warpgroup does softmax while the other owns the tensor cores
    q_register_steps: int = 0  # of the head_dim / 16 steps of S = Q K^T, those that take Q from registers
    q_stages: int = 1  # Q buffers; 2 load the next tile's Q during this tile
    extra_v_stages: int = 0  # V buffers beyond `stages`
    cluster: int = 1  # thread blocks along q that share K and V by TMA multicast
    # dynamic: longest first from an atomic counter; stream_k: the last wave's tiles are cut into equal shares
    tile_order: Literal["static", "dynamic", "stream_k"] = "static"
    section_mib: int = 32  # of K and V: the heads whose tiles are drawn together in the order dynamic
    key_order: Literal["descending", "ascending"] = "descending"  # in which a q tile walks its key tiles
    # what exponentials are relative to: the running maximum, or the maximum of the first whole key tile
    reference: Literal["running", "first"] = "running"
    edge_tiles: Literal["inline", "apart"] = "inline"  # apart: tiles at a mask's edges get their own loop
    output_wait: Literal["early", "middle", "late"] = "middle"  # await O += P V before, in, after the softmax
    rescale: Literal["early", "late"] = "early"  # rescale O after the softmax, or beside the next Q K^T
    # parts of a score that depend on q - kv alone: computed while S = Q K^T runs, or after it
    distance_terms: Literal["early", "late"] = "late"
    pack_gqa: bool = False  # fold the query heads of one K/V head into the q tile
    o_buffer: Literal["q", "v", "own"] = "q"  # O is staged in a buffer of Q or V, or in one of its own
    producer_registers: int = 24  # setmaxnreg, a multiple of 8 from 24 to 256, as for the consumers
    consumer_registers: int = 240


@dataclass(frozen=True)
class MaskPlan:
    """The mask as the kernel sees it."""

    label: str  # "full", "causal", "window4096": as in kernel names
    condition: Boolean  # which (q, kv) are kept, in the symbols of `flashgen.spec.symbols`
    derivation: MaskDerivation  # the intervals and the route that follow from it

    @classmethod
    def of_bounds(cls, label: str, bounds: RowBounds) -> MaskPlan:
        """The mask that keeps one interval of keys in each row."""
        first = () if bounds.first is None else (Ge(KV, bounds.first),)
        last = () if bounds.last is None else (Le(KV, bounds.last),)
        return cls(label, And(*first, *last), MaskDerivation("bounds", (bounds,)))

    @property
    def keeps_all(self) -> bool:
        """Whether every row keeps every key, however the condition is written."""
        return self.derivation.route == "bounds" and self.derivation.segments == (RowBounds(None, None),)

    @property
    def listed(self) -> bool:
        """Whether a block visits a list of tiles, rather than one span of them for each of its parts."""
        return self.derivation.route == "map" or len(self.derivation.segments) > 1

    @property
    def bounds(self) -> RowBounds:
        """The interval of keys of each row, where that is all there is to the mask.

        Raises:
            PlanError: it is not: the mask has several segments, or elements to be tested one by one.
        """
        if self.listed:
            raise PlanError(f"mask {self.label} is not one interval of keys per row")
        return self.derivation.segments[0]


@dataclass(frozen=True)
class ScorePlan:
    """What becomes of each ``scale * (Q . K)`` before the softmax."""

    label: str = ""  # as in kernel names; empty where there is none
    expr: Expr = SCORE  # in `SCORE` and the symbols of `flashgen.spec.symbols`; SCORE itself: nothing


@dataclass(frozen=True)
class Explanation:
    """Why the plan is what it is. JSON-serialisable throughout."""

    binding: str = ""  # the constraint that stopped the tile from growing
    slack: tuple[tuple[str, str], ...] = ()  # (constraint, "used / allowed")
    rejected: tuple[tuple[str, str], ...] = ()  # (neighbour, reason)
    cost: tuple[tuple[str, float], ...] = ()  # (term, seconds or bytes)
    origin: Literal["solved", "tuned", "given"] = "solved"
    measured: tuple[
        tuple[str, str], ...
    ] = ()  # of a tuned plan: what was measured, and how far the model was


@dataclass(frozen=True)
class KernelPlan:
    """spec + arch -> one kernel. Sizes are elements unless they say bytes."""

    spec: str  # name of the spec
    family: Literal["sm80", "sm90"]
    target: str  # "sm_90a"
    dtype: Literal["bf16", "fp16"]
    head_dim_qk: int
    head_dim_v: int
    group: int  # heads_q / heads_kv
    align: Literal["bottom_right", "top_left"]
    mask: MaskPlan
    scale: float  # the spec's default; a call may override it
    tile_q: int
    tile_kv: int
    stages: int  # K/V buffers
    warps: int  # warps that compute; the sm90 producer comes on top
    schedule: Sm80Schedule | Sm90Schedule
    smem_bytes: int  # dynamic shared memory of a block
    registers: int  # per computing thread, as predicted
    blocks_per_sm: int
    score: ScorePlan = ScorePlan()
    tensors: tuple[TensorInput, ...] = ()  # that mask and score read, in the order of the launch's arguments
    parameters: tuple[RuntimeParameter, ...] = ()  # passed at call time
    sink: bool = False  # a logit of each query head joins the softmax's denominator
    why: Explanation = field(default=Explanation(), compare=False)

    @property
    def stream_k(self) -> bool:
        """Whether blocks share tiles."""
        return isinstance(self.schedule, Sm90Schedule) and self.schedule.tile_order == "stream_k"

    @property
    def first_reference(self) -> bool:
        """Whether tiles may have to be repeated, since the exponentials' reference is not their maximum."""
        return isinstance(self.schedule, Sm90Schedule) and self.schedule.reference == "first"

    @property
    def kernel(self) -> str:
        """Entry point: ``attn_fwd_causal_softcap50_sink_bf16_d128_sm90a``.

        Score, sink, GQA and head_dim_v are named where there are any that matter.
        """
        dims = f"d{self.head_dim_qk}"
        if self.head_dim_v != self.head_dim_qk:
            dims += f"_{self.head_dim_v}"
        parts = (
            "attn_fwd",
            self.mask.label,
            self.score.label,
            "sink" if self.sink else "",
            self.dtype,
            dims,
            f"g{self.group}" if self.group > 1 else "",
            self.target.replace("_", ""),
        )
        return "_".join(filter(None, parts))

    @property
    def preparation(self) -> Literal["ranges", "map"] | None:
        """What a second kernel writes before the launch: ranges of keys for each row, lists of tiles."""
        route = self.mask.derivation.route
        return None if route == "bounds" else route

    @property
    def threads(self) -> int:
        """Threads of a block; the sm90 producer is one more warpgroup."""
        return 32 * self.warps + (128 if self.family == "sm90" else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON-safe; `plan_from_dict` reads it back to an equal plan."""
        from flashgen.plan.record import plan_to_dict

        return plan_to_dict(self)


__all__ = [
    "Explanation",
    "KernelPlan",
    "MaskPlan",
    "ScorePlan",
    "Sm80Schedule",
    "Sm90Schedule",
]
