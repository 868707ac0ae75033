"""What a kernel is held against: the textbook formula in float64, and the same in the tensors' own precision.

Nothing here is shared with the kernels' side but the formulas. The mask is the spec's *condition*, evaluated
for every (q, kv); the row bounds and the maps that the tiles come from are derived from the same condition by
other means, and a mistake there shows here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flashgen.runtime.arguments import check_layout
from flashgen.runtime.elements import Box, Elements
from flashgen.runtime.inputs import Declarations, Sizes, arrange, check_extents
from flashgen.spec import AttentionSpec

_ROWS = 512  # computed at a time: [heads, _ROWS, seqlen_kv] in float64 is the memory that this needs


def reference(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    params: Mapping[str, float] | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(score(scale * Q K^T), masked) V in float64, on the tensors' device.

    Shapes as for a kernel of `spec`: q [batch, seqlen_q, heads_q, head_dim_qk], k and v likewise with
    heads_kv; `tensors`, `params` and `sink` as for a call of it, in any floating dtype. Returns o [batch,
    seqlen_q, heads_q, head_dim_v] and lse [batch, heads_q, seqlen_q], both float64.

    Raises `LaunchError` for shapes that do not fit, and for inputs that are missing.
    """
    check_layout(q, k, v)
    formula = Textbook(
        spec, q.double(), k.double(), v.double(), scale=scale, tensors=tensors, params=params, sink=sink
    )
    return formula.forward()


def same_precision(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    params: Mapping[str, float] | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same formula in q's dtype, as one writes it in torch: both products and the probabilities are
    rounded to it, and what is between them is fp32.

    Its distance from `reference` is the yardstick for a kernel's. Returns o, and lse in fp32.
    """
    check_layout(q, k, v)
    return Textbook(spec, q, k, v, scale=scale, tensors=tensors, params=params, sink=sink).forward()


def tolerance(expected: Tensor, textbook: Tensor) -> float:
    """The largest absolute error that a kernel may have: twice the same-precision textbook's.

    At least one unit in the last place of the largest output: where there are few, a textbook may be exact by
    chance.
    """
    if expected.numel() == 0:
        return 0.0
    _, exponent = math.frexp(float(expected.abs().max()))
    unit = math.ldexp(torch.finfo(textbook.dtype).eps, exponent - 1)
    return max(2 * float((textbook.double() - expected).abs().max()), unit)


@dataclass(frozen=True)
class Block:
    """A part of one attention and what lies between; [batches, heads, rows, columns] but for o and lse."""

    score: Tensor  # scale * Q K^T
    kept: Tensor  # bool, broadcastable
    p: Tensor  # softmax
    o: Tensor  # [batches, heads, rows, head_dim_v]
    lse: Tensor  # [batches, heads, rows]


class Textbook:
    """The formula of a spec on the tensors of one call, computed in their dtype, in parts that fit memory.

    What is between the products, masks and scores too, is at least fp32. Autograd can follow.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        tensors: Mapping[str, Tensor] | None,
        params: Mapping[str, float] | None,
        sink: Tensor | None,
    ) -> None:
        declared = Declarations.of(spec)
        self.condition = spec.attention.condition
        self.modified = spec.attention.score_expr
        self.scale = spec.scale if scale is None else scale
        self.inputs = arrange(declared, tensors, params, sink, name=spec.name)
        self.sizes = Sizes.of(q, k, spec.attention.align)
        check_extents(declared, self.inputs, self.sizes)
        self.real = torch.promote_types(q.dtype, torch.float32)
        self.elements = Elements(
            declared, self.inputs, self.sizes, scale=self.scale, real=self.real, device=q.device
        )
        self.q, self.k, self.v = q, k, v

    def forward(self) -> tuple[Tensor, Tensor]:
        """o [batch, seqlen_q, heads_q, head_dim_v] and lse [batch, heads_q, seqlen_q]."""
        sizes = self.sizes
        o = self.q.new_zeros(sizes.batch, sizes.seqlen_q, sizes.heads_q, self.v.shape[3])
        lse = self.q.new_zeros(sizes.batch, sizes.heads_q, sizes.seqlen_q, dtype=self.real)
        for box in self.boxes():
            block = self.block(box)
            rows = slice(box.rows.start, box.rows.stop)
            o[box.batches.start, rows] = block.o[0].transpose(0, 1)
            lse[box.batches.start, :, rows] = block.lse[0]
        return o, lse

    def boxes(self) -> Iterator[Box]:
        """All scores, a batch and some rows at a time."""
        sizes = self.sizes
        for batch in range(sizes.batch):
            for start in range(0, sizes.seqlen_q, _ROWS):
                rows = range(start, min(start + _ROWS, sizes.seqlen_q))
                yield Box(range(batch, batch + 1), range(sizes.heads_q), rows, range(sizes.seqlen_kv))

    def block(self, box: Box) -> Block:
        """One part; its box must span all keys."""
        score = (self.queries(box) @ self.keys(box).mT).to(self.real) * self.scale
        kept = self.elements.at(self.condition, box)
        modified = self.elements.at(self.modified, box, {"score": score}).expand(score.shape)
        logits = modified.masked_fill(~kept, -math.inf)
        if self.inputs.sink is not None:  # one more key, whose value is zero
            sink = self.inputs.sink[box.heads.start : box.heads.stop].to(self.real)[None, :, None, None]
            logits = torch.cat([logits, sink.expand(*logits.shape[:3], 1)], -1)
        lse = (
            torch.logsumexp(logits, -1) if logits.shape[-1] else logits.new_full(logits.shape[:3], -math.inf)
        )
        # A row without a key has lse = -inf, and -inf - (-inf) would be NaN.
        p = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])[..., : score.shape[-1]]
        return Block(score, kept, p, p.to(self.v.dtype) @ self.values(box), lse)

    def queries(self, box: Box) -> Tensor:
        """q of a box: [batches, heads, rows, head_dim_qk]."""
        rows = slice(box.rows.start, box.rows.stop)
        return self.q[box.batches.start : box.batches.stop, rows, box.heads.start : box.heads.stop].transpose(
            1, 2
        )

    def keys(self, box: Box) -> Tensor:
        """k of a box, once for each query head: [batches, heads, columns, head_dim_qk]."""
        return self._of_query_heads(self.k, box)

    def values(self, box: Box) -> Tensor:
        """v of a box, once for each query head: [batches, heads, columns, head_dim_v]."""
        return self._of_query_heads(self.v, box)

    def _of_query_heads(self, tensor: Tensor, box: Box) -> Tensor:
        group = self.sizes.heads_q // self.sizes.heads_kv
        heads = [head // group for head in box.heads]
        columns = slice(box.columns.start, box.columns.stop)
        return tensor[box.batches.start : box.batches.stop, columns][:, :, heads].transpose(1, 2)


__all__ = ["Block", "Textbook", "reference", "same_precision", "tolerance"]
