"""The gradients of an attention in float64, through the derivatives that sympy gives of its score.

    dP = dO V^T                       D = rowsum(dO * O)
    dS' = P * (dP - D)                dS = dS' * d score'/d score * scale
    dQ = dS K      dK = dS^T Q      dV = P^T dO
    d tensor[i] = sum of dS' * d score'/d read over all the reads of element i
    d sink = -sum of exp(sink - lse) * D

What a backward kernel is held against, and a check of `flashgen.spec.derivative` against torch's autograd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sympy import Expr
from sympy.core.function import AppliedUndef
from torch import Tensor

from flashgen.runtime.arguments import check_layout
from flashgen.runtime.elements import Box
from flashgen.runtime.reference import Block, Textbook
from flashgen.spec import AttentionSpec
from flashgen.spec.derivative import score_derivatives


@dataclass(frozen=True)
class Gradients:
    """float64, each of its tensor's shape."""

    q: Tensor
    k: Tensor
    v: Tensor
    tensors: Mapping[str, Tensor]  # of those declared with `grad: true`
    sink: Tensor | None


def reference_gradients(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    *,
    scale: float | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    params: Mapping[str, float] | None = None,
    sink: Tensor | None = None,
) -> Gradients:
    """The gradients of sum(o * do), where o is what `reference` returns for the same arguments.

    `do` is [batch, seqlen_q, heads_q, head_dim_v], in any floating dtype. A row with every key masked
    contributes nothing.
    """
    check_layout(q, k, v)
    formula = Textbook(
        spec, q.double(), k.double(), v.double(), scale=scale, tensors=tensors, params=params, sink=sink
    )
    with torch.no_grad():
        return _Backward(spec, formula, do.double()).run()


class _Backward:
    def __init__(self, spec: AttentionSpec, formula: Textbook, do: Tensor) -> None:
        self.formula = formula
        self.do = do
        values = dict(zip(spec.attention.inputs, formula.inputs.tensors, strict=True))
        tensors = {tensor.name: _zeros(value) for tensor, value in values.items() if tensor.grad}
        self.derivatives = score_derivatives(spec.attention.score_expr, tensors.keys())
        sink = formula.inputs.sink
        self.gradients = Gradients(
            _zeros(formula.q),
            _zeros(formula.k),
            _zeros(formula.v),
            tensors,
            None if sink is None else _zeros(sink),
        )

    def run(self) -> Gradients:
        for box in self.formula.boxes():
            self.add(box, self.formula.block(box))
        return self.gradients

    def add(self, box: Box, block: Block) -> None:
        """What one part of the scores contributes."""
        formula, gradients = self.formula, self.gradients
        batch, rows = box.batches.start, slice(box.rows.start, box.rows.stop)
        do = self.do[box.batches.start : box.batches.stop, rows].transpose(1, 2)
        delta = (do * block.o).sum(-1, keepdim=True)
        modified = block.p * (do @ formula.values(box).mT - delta)  # dS'
        score = modified * self.at(self.derivatives.score, box, block) * formula.scale
        gradients.q[batch, rows] += (score @ formula.keys(box))[0].transpose(0, 1)
        gradients.k[batch] += self.of_shared_heads(score.mT @ formula.queries(box))
        gradients.v[batch] += self.of_shared_heads(block.p.mT @ do)
        for read, slope in self.derivatives.reads:
            self.scatter(read, box, modified * self.at(slope, box, block))
        if gradients.sink is not None and formula.inputs.sink is not None:
            weight = torch.exp(formula.inputs.sink.double()[:, None] - block.lse[0])
            gradients.sink.sub_((weight * delta[0, ..., 0]).sum(-1))

    def at(self, slope: Expr, box: Box, block: Block) -> Tensor:
        """A derivative where an element is kept; what it is elsewhere (infinite, maybe) does not matter."""
        value = self.formula.elements.at(slope, box, {"score": block.score}).to(block.score.dtype)
        return torch.where(block.kept, value, 0.0)

    def of_shared_heads(self, gradient: Tensor) -> Tensor:
        """[1, heads_q, columns, d], summed over the query heads of each K/V head: [columns, heads_kv, d]."""
        heads_kv = self.formula.sizes.heads_kv
        _, _, *rest = gradient.shape
        return gradient.reshape(heads_kv, -1, *rest).sum(1).transpose(0, 1)

    def scatter(self, read: AppliedUndef, box: Box, values: Tensor) -> None:
        """Add `values` [1, heads, rows, columns] to the elements that were read there."""
        gradient = self.gradients.tensors[read.func.__name__]
        indices = self.formula.elements.indices(read, box)
        if not indices:
            gradient.add_(values.sum())
            return
        shape = torch.broadcast_tensors(*indices)[0].shape  # type: ignore[no-untyped-call]
        padded = (1,) * (values.dim() - len(shape)) + shape
        alike = [dim for dim, length in enumerate(padded) if length == 1]  # one element along all of it
        summed = values.sum(alike, keepdim=True) if alike else values
        gradient.index_put_(indices, summed.reshape(shape), accumulate=True)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)


__all__ = ["Gradients", "reference_gradients"]
