"""The part of a spec that tiles depend on, as one hashable record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from flashgen.plan.model import MaskPlan, ParameterPlan, ScorePlan, TensorPlan
from flashgen.plan.tiles import Align, TileCounts, count
from flashgen.plan.tiling import Head
from flashgen.spec.bounds import RowBounds

if TYPE_CHECKING:
    from flashgen.spec import AttentionSpec


@dataclass(frozen=True)
class Workload:
    """What is to be computed: q [batch, seqlen_q, heads_q, head_dim_qk] and so on. Sizes are elements."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    head_dim_qk: int
    head_dim_v: int
    dtype: Literal["bf16", "fp16"]
    align: Align
    mask: MaskPlan
    score: ScorePlan = field(default=ScorePlan())
    tensors: tuple[TensorPlan, ...] = ()
    parameters: tuple[ParameterPlan, ...] = ()
    sink: bool = False

    @classmethod
    def of(cls, spec: AttentionSpec) -> Workload:
        """The workload that a spec names under `workload:`."""
        attention = spec.attention
        return cls(
            batch=spec.workload.batch,
            heads_q=attention.heads.q,
            heads_kv=attention.heads.kv,
            seqlen_q=spec.workload.seqlen_q,
            seqlen_kv=spec.workload.seqlen_kv,
            head_dim_qk=attention.head_dim.qk,
            head_dim_v=attention.head_dim.v,
            dtype=attention.dtype,
            align=attention.align,
            mask=MaskPlan(attention.mask_label, attention.condition, attention.derivation),
            score=ScorePlan(attention.score_label, attention.score_expr),
            tensors=attention.inputs,
            parameters=attention.runtime,
            sink=attention.sink,
        )

    @property
    def bounds(self) -> RowBounds:
        """The interval of keys of each row, where that is all there is to the mask. PlanError if not."""
        return self.mask.bounds

    @property
    def head(self) -> Head:
        """What the constraints depend on."""
        has_first = self.bounds.first is not None
        return Head(self.head_dim_qk, self.head_dim_v, self.heads_q // self.heads_kv, has_first)

    def tiles(self, tile_q: int, tile_kv: int) -> TileCounts:
        """Tiles, rows and pairs of one (batch, head)."""
        return count(self.bounds, self.align, self.seqlen_q, self.seqlen_kv, tile_q, tile_kv)

    @property
    def kept(self) -> int:
        """(q, kv) pairs that the mask keeps in one (batch, head)."""
        return self.tiles(128, 128).kept

    @property
    def flops(self) -> int:
        """FLOPs of both matrix products over the kept pairs, the count that TFLOP/s are quoted by."""
        return 2 * self.batch * self.heads_q * self.kept * (self.head_dim_qk + self.head_dim_v)
