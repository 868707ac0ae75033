"""The interpreter: runs a plan on CPU tensors tile by tile, as its kernel does.

It takes the plan's decisions from where the kernels' come from (`plan.tiles`, and `runtime.preparation` for
what is computed before a launch): which K/V tiles a q tile visits, in which order, and which of them are
masked. A tile that is not masked is not masked here either, and K and V are padded with zeros to whole tiles
as in shared memory, so that a wrong decision shows in the result. The arithmetic is that of FlashAttention-2
(Dao 2023, section 3.1): online softmax in fp32, exponentials to base 2 with the scale folded in, P rounded to
the tensors' dtype before the second product, fp32 accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flashgen.plan.model import KernelPlan
from flashgen.runtime.arguments import check_kernel, check_scale
from flashgen.runtime.decisions import Decisions
from flashgen.runtime.elements import Box, Elements
from flashgen.runtime.inputs import Declarations, Inputs, Sizes, arrange, check_inputs, check_sorted
from flashgen.spec.symbols import SCORE

_LOG2_E = math.log2(math.e)


def interpret(
    plan: KernelPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    params: Mapping[str, float] | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by `plan`; any family, any target.

    Args:
        q: [batch, seqlen_q, heads_q, head_dim_qk], in the plan's dtype, any strides.
        k: [batch, seqlen_kv, heads_kv, head_dim_qk].
        v: [batch, seqlen_kv, heads_kv, head_dim_v].
        scale: of the scores; the plan's where `None`.
        tensors: those that mask and score read, by name, as the plan declares them.
        params: the runtime parameters, by name.
        sink: fp32 [heads_q], where the plan has one.

    Returns:
        o [batch, seqlen_q, heads_q, head_dim_v] in q's dtype, and lse [batch, heads_q, seqlen_q] in fp32
        (natural logarithm). A row with every key masked gives 0 and -inf, or the sink.

    Raises `LaunchError` where the tensors do not fit the plan.
    """
    inputs = arrange(Declarations.of(plan), tensors, params, sink, name=plan.kernel)
    return interpret_with(plan, q, k, v, scale, inputs)


def interpret_with(
    plan: KernelPlan, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """`interpret` with the inputs in the plan's order, and maybe prepared."""
    check_kernel(q, k, v, plan, name=plan.kernel)
    declared, sizes = Declarations.of(plan), Sizes.of(q, k, plan.align)
    check_inputs(declared, inputs, sizes, q.device)
    check_sorted(declared, inputs)  # a kernel cannot without waiting
    scale = plan.scale if scale is None else scale
    check_scale(scale)
    o = q.new_zeros(sizes.batch, sizes.seqlen_q, sizes.heads_q, plan.head_dim_v)
    lse = q.new_full((sizes.batch, sizes.heads_q, sizes.seqlen_q), -math.inf, dtype=torch.float32)
    if inputs.sink is not None:
        lse.copy_(inputs.sink[:, None])
    if o.numel() == 0 or sizes.seqlen_kv == 0:
        return o, lse

    elements = Elements(declared, inputs, sizes, scale=scale, real=torch.float32, device=q.device)
    decisions = Decisions(plan, elements, inputs.prepared)
    queries = q.float().transpose(1, 2)  # [batch, heads_q, seqlen_q, head_dim]
    keys, values = (_whole_tiles(tensor, plan) for tensor in (k, v))
    for box in decisions.boxes():
        batches, heads, rows = (slice(part.start, part.stop) for part in (box.batches, box.heads, box.rows))
        softmax = _OnlineSoftmax(queries[batches, heads, rows], plan, scale, q.dtype)
        for tile, masked in decisions.visits(box):
            columns = range(tile * plan.tile_kv, (tile + 1) * plan.tile_kv)
            at = Box(box.batches, box.heads, box.rows, columns)
            here = slice(columns.start, columns.stop)
            s = softmax.q @ keys[batches, heads, here].mT
            if plan.score.expr != SCORE:
                s = elements.at(plan.score.expr, at, {"score": s * scale}).expand(s.shape)
            softmax.visit(s, values[batches, heads, here], decisions.kept(at) if masked else None)
        sink = None if inputs.sink is None else inputs.sink[heads]
        tile_o, lse[batches, heads, rows] = softmax.finish(sink)
        o[batches, rows, heads] = tile_o.transpose(1, 2).to(o.dtype)
    return o, lse


class _OnlineSoftmax:
    """The running maximum m, sum l and unnormalised O of a box of rows, in fp32.

    Where the plan has a score, what is visited is in natural units; otherwise it is Q K^T, and the scale is
    folded into the exponentials.
    """

    def __init__(self, q: Tensor, plan: KernelPlan, scale: float, dtype: torch.dtype) -> None:
        self.q = q
        self.scale = scale if plan.score.expr == SCORE else 1.0
        self.dtype = dtype
        self.m = q.new_full(q.shape[:-1], -math.inf)
        self.l = q.new_zeros(q.shape[:-1])
        self.o = q.new_zeros(*q.shape[:-1], plan.head_dim_v)

    def visit(self, s: Tensor, v: Tensor, kept: Tensor | None) -> None:
        if kept is not None:
            s = s.masked_fill(~kept, -math.inf)
        m = torch.maximum(self.m, s.amax(-1))
        # A row that has met no key yet has m = -inf; -inf - (-inf) would be NaN.
        anchor = m.masked_fill(m == -math.inf, 0.0) * (self.scale * _LOG2_E)
        p = torch.exp2(s * (self.scale * _LOG2_E) - anchor[..., None])
        correction = torch.exp2(self.m * (self.scale * _LOG2_E) - anchor)
        self.m = m
        self.l = self.l * correction + p.sum(-1)
        self.o = self.o * correction[..., None] + p.to(self.dtype).float() @ v

    def finish(self, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        """O and lse. The sink [heads] joins the sum as one more key, whose value is zero."""
        if sink is None:
            o = self.o / self.l.masked_fill(self.l == 0, 1.0)[..., None]
            return o, self.m * self.scale + self.l.log()
        logit = sink[:, None].expand(self.m.shape)
        m = torch.maximum(self.m * self.scale, logit)
        correction = torch.exp(self.m * self.scale - m)
        total = self.l * correction + torch.exp(logit - m)
        return self.o * (correction / total)[..., None], m + total.log()


def _whole_tiles(tensor: Tensor, plan: KernelPlan) -> Tensor:
    """[batch, seqlen, heads_kv, d] -> fp32 [batch, heads_q, seqlen rounded up to whole tiles, d], the rest
    zero.
    """
    padding = -tensor.shape[1] % plan.tile_kv
    padded = torch.nn.functional.pad(tensor.float().transpose(1, 2), (0, 0, 0, padding))
    return padded.repeat_interleave(plan.group, 1)


__all__ = ["interpret", "interpret_with"]
