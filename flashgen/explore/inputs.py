"""Inputs of a workload to try kernels with: random q, k and v, and samples of what a mask or score reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashgen.plan import Workload
from flashgen.runtime.arguments import DTYPES
from flashgen.runtime.inputs import INPUT_DTYPES, Sizes
from flashgen.spec import AttentionSpec
from flashgen.spec.inputs import RuntimeParameter, TensorInput
from flashgen.spec.sample import sample_tensor

_FLOAT = 20.0  # a runtime parameter of which nothing is known: a cap, a temperature


@dataclass(frozen=True)
class Samples:
    """What a call takes besides q, k and v, by name."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    params: Mapping[str, float] = field(default_factory=dict)
    sink: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of a kernel, of the interpreter and of the reference."""
        return {"tensors": self.tensors, "params": self.params, "sink": self.sink}


def random_inputs(work: Workload, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of N(0, 1) in the workload's dtype, [batch, seqlen, heads, head_dim]; always the same."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(seqlen: int, heads: int, head_dim: int) -> Tensor:
        # drawn in the tensors' own dtype: a float32 copy of a long workload may not fit beside it
        shape = (work.batch, seqlen, heads, head_dim)
        return torch.randn(shape, device=device, dtype=DTYPES[work.dtype], generator=generator)

    return (
        normal(work.seqlen_q, work.heads_q, work.head_dim_qk),
        normal(work.seqlen_kv, work.heads_kv, work.head_dim_qk),
        normal(work.seqlen_kv, work.heads_kv, work.head_dim_v),
    )


def sample_inputs(spec: AttentionSpec, q: Tensor, k: Tensor) -> Samples:
    """Something to call a kernel of `spec` with, on q's device: always the same.

    The gallery's tensors hold its samples; those that a spec declares itself are random, sorted where it says
    so.
    """
    attention = spec.attention
    sizes = Sizes.of(q, k, attention.align)
    generator = torch.Generator().manual_seed(2)
    return Samples(
        {tensor.name: _sample(tensor, sizes, generator).to(q.device) for tensor in attention.inputs},
        {parameter.name: _number(parameter, sizes) for parameter in attention.runtime},
        torch.randn(sizes.heads_q, generator=generator).to(q.device) if attention.sink else None,
    )


def _sample(tensor: TensorInput, sizes: Sizes, generator: torch.Generator) -> Tensor:
    dtype = INPUT_DTYPES[tensor.dtype]
    known = sample_tensor(
        tensor,
        batch=sizes.batch,
        heads_q=sizes.heads_q,
        heads_kv=sizes.heads_kv,
        seqlen_q=sizes.seqlen_q,
        seqlen_kv=sizes.seqlen_kv,
    )
    if known is not None:
        return torch.from_numpy(known).to(dtype)
    shape = tuple(sizes.length(axis) for axis in tensor.index)
    if tensor.dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.9
    if tensor.dtype == "int32":
        values = torch.randint(0, max(sizes.seqlen_kv, 1), shape, generator=generator, dtype=torch.int32)
        return values.sort(-1).values if tensor.sorted else values
    return torch.randn(shape, generator=generator).to(dtype)


def _number(parameter: RuntimeParameter, sizes: Sizes) -> float:
    """An integer is taken for a number of positions: an eighth of the keys."""
    if parameter.kind == "float":
        return _FLOAT
    return max(sizes.seqlen_kv // 8, 1 if parameter.least is None else parameter.least)


__all__ = ["Samples", "random_inputs", "sample_inputs"]
