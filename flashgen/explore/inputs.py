"""Random inputs of a workload."""

from __future__ import annotations

import torch

from flashgen.plan import Workload
from flashgen.runtime.arguments import DTYPES


def random_inputs(work: Workload, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of N(0, 1) in the workload's dtype, [batch, seqlen, heads, head_dim]; always the same."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(seqlen: int, heads: int, head_dim: int) -> torch.Tensor:
        # drawn in the tensors' own dtype: a float32 copy of a long workload may not fit beside it
        shape = (work.batch, seqlen, heads, head_dim)
        return torch.randn(shape, device=device, dtype=DTYPES[work.dtype], generator=generator)

    return (
        normal(work.seqlen_q, work.heads_q, work.head_dim_qk),
        normal(work.seqlen_kv, work.heads_kv, work.head_dim_qk),
        normal(work.seqlen_kv, work.heads_kv, work.head_dim_v),
    )
