"""The part of a spec that tiles depend on, as one hashable record."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from sympy import Basic, Piecewise, true
from sympy.core.function import AppliedUndef

from flashgen.plan.coverage import Coverage
from flashgen.plan.model import MaskPlan, ScorePlan
from flashgen.plan.operations import (
    ROW_REGISTERS,
    distance_parts,
    is_capped,
    of_condition,
    of_score,
    query_values,
)
from flashgen.plan.tiles import Align, TileCounts
from flashgen.plan.tiling import Head
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.symbols import HEAD, KV, SCORE

if TYPE_CHECKING:
    from flashgen.spec import AttentionSpec


def head_of(dim_qk: int, dim_v: int, group: int, mask: MaskPlan, score: ScorePlan, *, sink: bool) -> Head:
    """What the constraints depend on, of a kernel with this mask, score and sink."""
    segments = mask.derivation.segments
    residual = mask.derivation.residual  # true but for maps
    ends = [end for segment in segments for end in (segment.first, segment.last) if end is not None]
    plain_ends = not any(end.atoms(AppliedUndef, Piecewise) for end in ends)
    parts = (score.expr != SCORE, mask.listed, not plain_ends)
    return Head(
        dim_qk,
        dim_v,
        group,
        unmasked=mask.keeps_all,
        has_first=mask.listed or any(segment.first is not None for segment in segments),
        closed_form=mask.derivation.route == "bounds" and not mask.listed,
        listed=mask.listed,
        plain_ends=plain_ends,
        heads_alike=HEAD not in mask.condition.free_symbols | score.expr.free_symbols and not sink,
        elementwise=score.expr != SCORE or mask.listed,
        distances=len(distance_parts(score.expr)),
        capped=is_capped(score.expr) and not mask.listed,
        element_registers=of_score(score.expr).registers + of_condition(residual).registers,
        tested=residual != true,
        score_reads=_reads(score.expr),
        tested_reads=_reads(residual),
        row_registers=ROW_REGISTERS * sum(parts),
        query_values=query_values(score.expr) + query_values(residual),
    )


def _reads(expr: Basic) -> int:
    """Tensors that are read anew for each key."""
    return sum(read.has(KV) for read in expr.atoms(AppliedUndef))


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
    tensors: tuple[TensorInput, ...] = ()
    parameters: tuple[RuntimeParameter, ...] = ()
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

    @cached_property
    def head(self) -> Head:
        """What the constraints depend on."""
        group = self.heads_q // self.heads_kv
        return head_of(self.head_dim_qk, self.head_dim_v, group, self.mask, self.score, sink=self.sink)

    @property
    def suits_first_reference(self) -> bool:
        """Whether exponentials relative to the first key tile's maximum are possible, and rarely leave their
        range: in fp16 they do at 65504, where a score is 11 above that maximum.
        """
        return self.head.closed_form and self.dtype != "fp16"

    @property
    def first_reference_by_default(self) -> bool:
        """Where it was measured to be ahead."""
        return self.suits_first_reference and not self.head.elementwise

    @cached_property
    def coverage(self) -> Coverage:
        """The mask over this workload's scores."""
        return Coverage(
            self.mask, self.align, self.seqlen_q, self.seqlen_kv, self.batch, self.heads_q, self.heads_kv,
            self.tensors,
        )  # fmt: skip

    def tiles(self, tile_q: int, tile_kv: int) -> TileCounts:
        """Tiles, rows and pairs of one (batch, head)."""
        return self.coverage.count(tile_q, tile_kv)

    @property
    def kept(self) -> int:
        """(q, kv) pairs that the mask keeps in one (batch, head)."""
        return self.tiles(128, 128).kept

    @property
    def flops(self) -> int:
        """FLOPs of both matrix products over the kept pairs, the count that TFLOP/s are quoted by."""
        return 2 * self.batch * self.heads_q * self.kept * (self.head_dim_qk + self.head_dim_v)
