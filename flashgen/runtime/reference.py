"""What a kernel is held against: the textbook formula in float64, and the same in the tensors' own precision.

Nothing here is shared with the kernels' side. The mask is the spec's *condition*, evaluated for every (q,
kv); the row bounds that the tiles come from are derived from the same condition by other means, and a mistake
there shows here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import sympy
import torch
from torch import Tensor

from flashgen.runtime.arguments import check_layout
from flashgen.spec import AttentionSpec

_ROWS = 512  # computed at a time: [heads, _ROWS, seqlen_kv] in float64 is the memory that this needs


def reference(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T + mask) V in float64, on the tensors' device.

    Shapes as for a kernel of `spec`: q [batch, seqlen_q, heads_q, head_dim_qk], k and v likewise with
    heads_kv. Returns o [batch, seqlen_q, heads_q, head_dim_v] and lse [batch, heads_q, seqlen_q], both
    float64.
    """
    check_layout(q, k, v)
    return _textbook(spec, q.double(), k.double(), v.double(), scale)


def same_precision(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> Tensor:
    """The same formula in q's dtype, as one writes it in torch: both products and the probabilities are
    rounded to it.

    Its distance from `reference` is the yardstick for a kernel's. Returns o.
    """
    check_layout(q, k, v)
    return _textbook(spec, q, k, v, scale)[0]


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


def elementwise_mask(spec: AttentionSpec, seqlen_q: int, seqlen_kv: int, device: torch.device) -> Tensor:
    """The mask's condition at every position: bool [seqlen_q, seqlen_kv], True where the key is kept."""
    shift = seqlen_kv - seqlen_q if spec.attention.align == "bottom_right" else 0
    values = {
        "q": torch.arange(seqlen_q, device=device)[:, None] + shift,
        "kv": torch.arange(seqlen_kv, device=device)[None, :],
        "seqlen_q": torch.tensor(seqlen_q, device=device),
        "seqlen_kv": torch.tensor(seqlen_kv, device=device),
    }
    return evaluate(spec.attention.mask.condition, values).to(device).expand(seqlen_q, seqlen_kv)


def evaluate(expression: sympy.Basic, values: Mapping[str, Tensor]) -> Tensor:
    """A sympy expression over integer tensors, exactly. Walks the tree: nothing is turned into text or
    compiled.

    Raises `TypeError` for a function that is not in the list below.
    """
    if isinstance(expression, sympy.Symbol):
        return values[expression.name]
    if isinstance(expression, sympy.Integer):
        return torch.tensor(int(expression))
    if expression in (sympy.true, sympy.false):
        return torch.tensor(bool(expression))
    if isinstance(expression, sympy.floor):
        numerator, denominator = sympy.fraction(sympy.together(expression.args[0]))
        return torch.div(evaluate(numerator, values), evaluate(denominator, values), rounding_mode="floor")
    if expression.func not in _OPERATIONS:
        raise TypeError(f"the reference cannot evaluate {expression.func.__name__} in {expression}")
    result: Tensor = _OPERATIONS[expression.func](*(evaluate(arg, values) for arg in expression.args))
    return result


def _folded(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """sympy's sums, products and connectives take any number of arguments."""
    return lambda *arguments: reduce(operation, arguments)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    sympy.Add: _folded(operator.add),
    sympy.Mul: _folded(operator.mul),
    sympy.Max: _folded(torch.maximum),
    sympy.Min: _folded(torch.minimum),
    sympy.And: _folded(torch.logical_and),
    sympy.Or: _folded(torch.logical_or),
    sympy.Not: torch.logical_not,
    sympy.Abs: torch.abs,
    sympy.Mod: torch.remainder,
    sympy.Le: operator.le,
    sympy.Lt: operator.lt,
    sympy.Ge: operator.ge,
    sympy.Gt: operator.gt,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
}


def _textbook(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    scale = spec.scale if scale is None else scale
    batch, seqlen_q, heads_q, _ = q.shape
    seqlen_kv, heads_kv = k.shape[1:3]
    kept = elementwise_mask(spec, seqlen_q, seqlen_kv, q.device)
    o = q.new_zeros(batch, seqlen_q, heads_q, v.shape[3])
    lse = q.new_full((batch, heads_q, seqlen_q), -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    if o.numel() == 0 or seqlen_kv == 0:
        return o, lse
    group = heads_q // heads_kv
    for index in range(batch):
        keys, values = (tensor[index].transpose(0, 1).repeat_interleave(group, 0) for tensor in (k, v))
        for start in range(0, seqlen_q, _ROWS):
            rows = slice(start, start + _ROWS)
            s = (q[index, rows].transpose(0, 1) @ keys.mT).to(lse.dtype) * scale  # [heads_q, rows, seqlen_kv]
            s = s.masked_fill(~kept[rows], -math.inf)
            p = torch.softmax(s, -1).masked_fill(~kept[rows].any(-1, keepdim=True), 0.0)  # no key: 0/0
            o[index, rows] = (p.to(q.dtype) @ values).transpose(0, 1)
            lse[index, :, rows] = torch.logsumexp(s, -1)
    return o, lse


__all__ = ["elementwise_mask", "evaluate", "reference", "same_precision", "tolerance"]
