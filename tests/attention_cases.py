"""Random attention problems for the interpreter's tests and the GPU's: spec, shapes, layouts, and a seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from flashgen.runtime import reference, same_precision, tolerance
from flashgen.runtime.arguments import DTYPES
from flashgen.spec import AttentionSpec, parse_spec

MASKS: tuple[Any, ...] = ("full", "causal", {"window": 1}, {"window": 7}, {"window": 64}, {"window": 200})
HEAD_DIMS = (8, 16, 40, 64, 72, 80, 96, 128, 160, 192, 256)
LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 200, 257, 300)
LAYOUTS = ("contiguous", "heads_first", "packed", "last_strided", "misaligned", "expanded")


@dataclass(frozen=True)
class Case:
    """One problem. Sizes are elements."""

    head_dim_qk: int = 64
    head_dim_v: int = 64
    heads_kv: int = 1
    group: int = 1
    dtype: str = "bf16"
    mask: Any = "full"
    align: str = "bottom_right"
    batch: int = 1
    seqlen_q: int = 64
    seqlen_kv: int = 64
    layout: str = "contiguous"
    seed: int = 0
    target: str = "auto"
    tiles: Any = field(default="auto")

    def text(self) -> str:
        """The spec as its file would read; JSON is YAML."""
        return json.dumps(
            {
                "flashgen": 1,
                "name": "case",
                "attention": {
                    "heads": {"q": self.heads_kv * self.group, "kv": self.heads_kv},
                    "head_dim": {"qk": self.head_dim_qk, "v": self.head_dim_v},
                    "dtype": self.dtype,
                    "mask": self.mask,
                    "align": self.align,
                },
                "workload": {
                    "batch": max(self.batch, 1),
                    "seqlen": {"q": max(self.seqlen_q, 1), "kv": max(self.seqlen_kv, 1)},
                },
                "tiles": self.tiles,
                "target": self.target,
            }
        )

    def spec(self) -> AttentionSpec:
        return parse_spec(self.text(), "case.yaml")

    def tensors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of N(0, 1), laid out as asked."""
        generator = torch.Generator().manual_seed(self.seed)
        heads_q = self.heads_kv * self.group
        shapes = (
            (self.batch, self.seqlen_q, heads_q, self.head_dim_qk),
            (self.batch, self.seqlen_kv, self.heads_kv, self.head_dim_qk),
            (self.batch, self.seqlen_kv, self.heads_kv, self.head_dim_v),
        )
        made = (torch.randn(shape, generator=generator).to(device, DTYPES[self.dtype]) for shape in shapes)
        q, k, v = (laid_out(tensor, self.layout) for tensor in made)
        return q, k, v

    def contiguous(self) -> Case:
        return replace(self, layout="contiguous")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values behind other strides. What lies between them is NaN."""
    batch, seqlen, heads, head_dim = tensor.shape

    def within(*shape: int) -> Tensor:
        return tensor.new_full(shape, torch.nan)

    if layout == "heads_first":  # [batch, heads, seqlen, head_dim], as torch's SDPA has it
        view = within(batch, heads, seqlen, head_dim).transpose(1, 2)
    elif layout == "packed":  # a slice of a fused projection
        view = within(batch, seqlen, 3, heads, head_dim + 8)[:, :, 1, :, :head_dim]
    elif layout == "last_strided":
        view = within(batch, seqlen, heads, head_dim, 2)[..., 0]
    elif layout == "misaligned":
        view = within(tensor.numel() + 1)[1:].view(tensor.shape)
    elif layout == "expanded":  # one head for all, stride zero
        return tensor[:, :, :1].expand(tensor.shape)
    else:
        return tensor
    view.copy_(tensor)
    return view


def random_case(seed: int) -> Case:
    """The case of a seed, for long fuzzing without hypothesis."""
    rng = random.Random(seed)
    head_dim = rng.choice(HEAD_DIMS)
    return Case(
        head_dim_qk=head_dim,
        head_dim_v=head_dim if rng.random() < 0.8 else rng.choice(HEAD_DIMS),
        heads_kv=rng.choice((1, 2, 3)),
        group=rng.choice((1, 1, 2, 4, 7)),
        dtype=rng.choice(("bf16", "fp16")),
        mask=rng.choice(MASKS),
        align=rng.choice(("bottom_right", "bottom_right", "top_left")),
        batch=rng.choice((1, 2, 3)),
        seqlen_q=rng.choice((*LENGTHS, rng.randint(0, 1500))),
        seqlen_kv=rng.choice((*LENGTHS, rng.randint(0, 1500))),
        layout=rng.choice(LAYOUTS),
        seed=seed,
    )


CASES = st.builds(
    Case,
    head_dim_qk=st.sampled_from(HEAD_DIMS),
    head_dim_v=st.sampled_from(HEAD_DIMS),
    heads_kv=st.integers(1, 2),
    group=st.sampled_from((1, 2, 3)),
    dtype=st.sampled_from(("bf16", "fp16")),
    mask=st.sampled_from(MASKS),
    align=st.sampled_from(("bottom_right", "top_left")),
    batch=st.integers(1, 2),
    seqlen_q=st.one_of(st.sampled_from(LENGTHS), st.integers(0, 300)),
    seqlen_kv=st.one_of(st.sampled_from(LENGTHS), st.integers(0, 300)),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)


def assert_exact(case: Case, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Error against float64 at most twice the same-precision textbook's; lse to fp32 precision."""
    spec = case.spec()
    expected, expected_lse = reference(spec, q, k, v)
    assert o.shape == expected.shape and o.dtype == q.dtype
    assert lse.shape == expected_lse.shape and lse.dtype == torch.float32
    assert not o.isnan().any(), f"NaN in o: {case}"
    allowed = tolerance(expected, same_precision(spec, q, k, v))
    error = float((o.double() - expected).abs().max()) if o.numel() else 0.0
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}: {case}"
    empty = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), f"rows without keys differ: {case}"
    if lse.numel():
        torch.testing.assert_close(lse[~empty].double(), expected_lse[~empty], rtol=1e-5, atol=2e-5)
    assert not o.transpose(1, 2)[empty].any(), f"a row without keys is not zero: {case}"


__all__ = [
    "CASES",
    "HEAD_DIMS",
    "LAYOUTS",
    "LENGTHS",
    "MASKS",
    "Case",
    "assert_exact",
    "laid_out",
    "random_case",
]
