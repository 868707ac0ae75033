"""The part of a spec that tiles depend on, as one hashable record."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from sympy import Basic, Dummy, Function, Piecewise, true
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
from flashgen.spec.symbols import HEAD, KV, SCORE, Q

if TYPE_CHECKING:
    from flashgen.spec import AttentionSpec


def head_of(dim_qk: int, dim_v: int, group: int, mask: MaskPlan, score: ScorePlan, *, sink: bool) -> Head:
    """What the constraints depend on, of a kernel with this mask, score and sink."""
    segments = mask.derivation.segments
    residual = mask.derivation.residual  # true but for maps
    ends = [end for segment in segments for end in (segment.first, segment.last) if end is not None]
    plain_ends = not any(end.atoms(AppliedUndef, Piecewise) for end in ends)
    parts = (score.expr != SCORE, mask.listed, not plain_ends)
    parts_of_distance = distance_parts(score.expr)
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
        distances=len(parts_of_distance),
        distances_are_reads=all(_is_plain_read(part) for part in parts_of_distance),
        capped=is_capped(score.expr) and not mask.listed,
        element_registers=of_score(score.expr).registers + of_condition(residual).registers,
        tested=residual != true,
        score_reads=_reads(score.expr),
        tested_reads=_reads(residual),
        row_registers=ROW_REGISTERS * sum(parts),
        query_values=query_values(score.expr) + query_values(residual),
    )


def _is_plain_read(part: Basic) -> bool:
    indices = part.args if isinstance(part, AppliedUndef) else (part,)
    return isinstance(part, AppliedUndef) and not any(i.has(Function, Piecewise) for i in indices)


def _of_positions(expr: Basic) -> bool:
    """Whether an expression computes with positions, and not only reads tensors at them."""
    reads = {read: Dummy() for read in expr.atoms(AppliedUndef)}
    return bool(expr.xreplace(reads).has(Q, KV))


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
        """Whether the first key tile is like the others. What is computed of positions, as ALiBi's distances,
        is highest at a row's own position, where only a causal mask lets the keys begin.
        """
        causal = [segment.last for segment in self.mask.derivation.segments] == [Q]
        return self.suits_first_reference and (causal or not _of_positions(self.score.expr))

    @property
    def score_choices(self) -> dict[str, Any]:
        """What measured best in an `Sm90Schedule` for scores that are computed, relative to the first key
        tile (docs/performance.md, the fourth round).
        """
        head, choices = self.head, dict[str, Any]()
        causal = not self.mask.keeps_all
        if not head.elementwise or not self.first_reference_by_default:
            return choices
        if head.capped:
            if causal and head.dim_v > 64:  # a whole key tile tells at once that no tanh is needed
                choices["key_order"] = "ascending"
            return choices
        if causal:  # scores that fall with the distance are highest at a row's own position
            choices |= {"key_order": "descending", "ping_pong": False}
        if not head.distances_are_reads:  # T5's buckets, say: as they are by default
            return choices
        if head.distances:  # arithmetic would only take the place of other work
            choices["distance_terms"] = "early"
        if head.score_reads <= head.distances:  # else reads of each element are under way meanwhile
            choices["output_wait"] = "early"
        return choices

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
