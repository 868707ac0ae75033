"""The interpreter: runs a plan on CPU tensors tile by tile, as its kernel does.

It takes the plan's decisions from the functions that the kernels print (`plan.tiles`): which K/V tiles a q
tile visits, in which order, and which of them are masked. A tile that is not masked is not masked here
either, and K and V are padded with zeros to whole tiles as in shared memory, so that a wrong decision shows
in the result. The arithmetic is that of FlashAttention-2 (Dao 2023, section 3.1): online softmax in fp32,
exponentials to base 2 with the scale folded in, P rounded to the tensors' dtype before the second product,
fp32 accumulation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashgen.plan.model import KernelPlan, Sm90Schedule
from flashgen.plan.tiles import needs_mask, row_shift, visited
from flashgen.runtime.arguments import check_kernel, check_scale

_WARPGROUP_ROWS = 64
_LOG2_E = math.log2(math.e)


def interpret(
    plan: KernelPlan, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by `plan`; any family, any target.

    Args:
        q: [batch, seqlen_q, heads_q, head_dim_qk], in the plan's dtype, any strides.
        k: [batch, seqlen_kv, heads_kv, head_dim_qk].
        v: [batch, seqlen_kv, heads_kv, head_dim_v].
        scale: of the scores; the plan's where `None`.

    Returns:
        o [batch, seqlen_q, heads_q, head_dim_v] in q's dtype, and lse [batch, heads_q, seqlen_q] in fp32
        (natural logarithm). A row with every key masked gives 0 and -inf.

    Raises `LaunchError` where the tensors do not fit the plan.
    """
    check_kernel(q, k, v, plan, name=plan.kernel)
    scale = plan.scale if scale is None else scale
    check_scale(scale)
    batch, seqlen_q, heads_q, _ = q.shape
    seqlen_kv, heads_kv = k.shape[1:3]
    o = q.new_zeros(batch, seqlen_q, heads_q, plan.head_dim_v)
    lse = q.new_full((batch, heads_q, seqlen_q), -math.inf, dtype=torch.float32)
    if o.numel() == 0 or seqlen_kv == 0:
        return o, lse

    # [batch, heads_kv, group, seqlen_q, head_dim]; K and V have 1 in the place of group
    queries = q.float().reshape(batch, seqlen_q, heads_kv, plan.group, -1).permute(0, 2, 3, 1, 4)
    keys, values = (_whole_tiles(tensor, plan.tile_kv) for tensor in (k, v))
    shift = row_shift(plan.align, seqlen_q, seqlen_kv)
    bounds = plan.mask.bounds
    intervals = torch.tensor(
        [bounds.evaluate(row + shift, seqlen_q, seqlen_kv) for row in range(seqlen_q)], device=q.device
    )
    step = _rows_of_a_decision(plan)
    descending = getattr(plan.schedule, "key_order", "descending") == "descending"
    for start in range(0, seqlen_q, step):
        rows = slice(start, min(start + step, seqlen_q))
        q0, q1 = rows.start + shift, rows.stop - 1 + shift
        softmax = _OnlineSoftmax(queries[..., rows, :], plan.head_dim_v, scale, q.dtype)
        tiles = visited(bounds, q0, q1, seqlen_q, seqlen_kv, plan.tile_kv)
        for tile in reversed(tiles) if descending else tiles:
            columns = slice(tile * plan.tile_kv, (tile + 1) * plan.tile_kv)
            kept = None
            if needs_mask(bounds, tile, q0, q1, seqlen_q, seqlen_kv, plan.tile_kv):
                first, last = intervals[rows].unbind(-1)
                kv = torch.arange(columns.start, columns.stop, device=q.device)
                kept = (first[:, None] <= kv) & (kv <= last[:, None])
            softmax.visit(keys[..., columns, :], values[..., columns, :], kept)
        tile_o, tile_lse = softmax.finish()
        o[:, rows] = tile_o.permute(0, 3, 1, 2, 4).flatten(2, 3).to(o.dtype)
        lse[:, :, rows] = tile_lse.flatten(1, 2)
    return o, lse


def _rows_of_a_decision(plan: KernelPlan) -> int:
    """Query positions whose K/V tiles are chosen together: those of a q tile; on Hopper, of a warpgroup."""
    if not isinstance(plan.schedule, Sm90Schedule):
        return plan.tile_q
    return max(_WARPGROUP_ROWS // plan.group, 1) if plan.schedule.pack_gqa else _WARPGROUP_ROWS


class _OnlineSoftmax:
    """The running maximum m, sum l and unnormalised O of one q tile, for all batches and heads at once, in
    fp32.
    """

    def __init__(self, q: Tensor, head_dim_v: int, scale: float, dtype: torch.dtype) -> None:
        self.q = q
        self.scale = scale
        self.dtype = dtype
        self.m = q.new_full(q.shape[:-1], -math.inf)
        self.l = q.new_zeros(q.shape[:-1])
        self.o = q.new_zeros(*q.shape[:-1], head_dim_v)

    def visit(self, k: Tensor, v: Tensor, kept: Tensor | None) -> None:
        s = self.q @ k.mT
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

    def finish(self) -> tuple[Tensor, Tensor]:
        o = self.o / self.l.masked_fill(self.l == 0, 1.0)[..., None]
        return o, self.m * self.scale + self.l.log()


def _whole_tiles(tensor: Tensor, tile_kv: int) -> Tensor:
    """[batch, seqlen, heads, d] -> fp32 [batch, heads, 1, seqlen rounded up to whole tiles, d], the rest
    zero.
    """
    padding = -tensor.shape[1] % tile_kv
    return torch.nn.functional.pad(tensor.float().permute(0, 2, 1, 3), (0, 0, 0, padding)).unsqueeze(2)


__all__ = ["interpret"]
