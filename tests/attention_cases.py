"""Random attention problems for the interpreter's tests and the GPU's: spec, shapes, layouts, and a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from flashgen.explore.inputs import sample_inputs
from flashgen.runtime import reference, same_precision, tolerance
from flashgen.runtime.arguments import DTYPES
from flashgen.spec import AttentionSpec, parse_spec
from flashgen.spec.gallery import GALLERY

# Every entry of the gallery once, and what its entries leave out: compositions, runtime parameters, tensors
# of all dtypes and axes, heads and batches that differ, rows without keys, sinks.
GALLERY_CASES: Mapping[str, Mapping[str, Any]] = {
    **{
        name: {"mask": entry.sample} if entry.kind == "mask" else {"mask": "causal", "score": entry.sample}
        for name, entry in GALLERY.items()
    },
    "causal document": {"mask": "causal and document"},
    "window or first keys": {"mask": "window(40) or kv < 4"},
    "two bands": {"mask": "band(10) or abs(q - kv - 60) < 7"},
    "two neighbourhoods": {"mask": "natten_2d(16, 12, 1) or natten_2d(8, 24, 2)"},
    "what holds of all": {"mask": "kv % 8 < 8 and q_index >= 0 and (causal or kv < 3)"},
    "document of a prefix": {"mask": "document and (kv < 30 or kv <= q)", "score": "softcap(20)"},
    "runtime window": {"mask": "kv <= q and q - kv < size", "params": {"size": "runtime"}},
    "runtime prefix": {"mask": "prefix_lm(prefix)", "params": {"prefix": {"runtime": "int", "min": 0}}},
    "runtime step": {"mask": "causal and (q - kv) % step == 0", "params": {"step": "runtime"}},
    "runtime cap": {"mask": "window(50)", "score": "softcap(cap)", "params": {"cap": "runtime"}},
    "heads that differ": {"mask": "kv <= q and (head % 2 == 0 or q - kv < 16)"},
    "heads of keys that differ": {"mask": "kv <= q and q - kv < 20 * (head_kv + 1)"},
    "padded causal": {"mask": "causal and padding", "sink": True},
    "keys left out": {
        "mask": "causal and valid[kv]",
        "inputs": {"valid": {"index": ["batch", "kv"], "dtype": "bool"}},
    },
    "pairs left out": {
        "mask": "pair != 0",
        "inputs": {"pair": {"index": ["head", "q", "kv"], "dtype": "bool"}},
    },
    "documents out of order": {
        "mask": "doc[q] == doc[kv] or kv == q",
        "inputs": {"doc": {"index": ["kv"], "dtype": "int32"}},
    },
    "rows without keys": {"mask": "kv <= q - 30 and q % 7 != 3", "sink": True},
    "rows and keys": {
        "mask": "band(40)",
        "score": "score * gain[q_index // 16] + left[q] - right[kv]",
        "inputs": {
            "gain": {"index": [64], "dtype": "fp16"},
            "left": {"index": ["batch", "head_kv", "q"], "dtype": "fp32"},
            "right": {"index": ["batch", "head", "kv"], "dtype": "bf16"},
        },
    },
    "capped alibi": {"mask": "causal", "score": "30 * tanh((score + slope[head] * (kv - q)) / 30)",
                     "inputs": {"slope": {"index": ["head"], "dtype": "fp32"}}},
    "score by distance": {"mask": "full", "score": "where(abs(q - kv) < 20, score, score / 2 - 1)"},
    "bias per batch": {
        "mask": "causal",
        "score": "score + pair",
        "inputs": {"pair": {"index": ["batch", "head", "q", "kv"], "dtype": "fp16"}},
    },
}  # fmt: skip
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
    score: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)  # the spec's `tensors`
    sink: bool = False
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
                    **({} if self.score is None else {"score": self.score}),
                    **({"params": dict(self.params)} if self.params else {}),
                    **({"tensors": dict(self.inputs)} if self.inputs else {}),
                    **({"sink": True} if self.sink else {}),
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

    def given(self, device: str | torch.device = "cpu") -> dict[str, Any]:
        """What mask and score read: keyword arguments of a call."""
        q, k, _ = self.tensors(device)
        return sample_inputs(self.spec(), q, k).arguments

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
        **(rng.choice(list(GALLERY_CASES.values())) if rng.random() < 0.5 else {"mask": rng.choice(MASKS)}),
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


def assert_exact(case: Case, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> None:
    """Error against float64 at most twice the same-precision textbook's; lse to fp32 precision.

    `given` is what mask and score read, see `Case.given`.
    """
    spec = case.spec()
    expected, expected_lse = reference(spec, q, k, v, **given)
    assert o.shape == expected.shape and o.dtype == q.dtype
    assert lse.shape == expected_lse.shape and lse.dtype == torch.float32
    assert not o.isnan().any(), f"NaN in o: {case}"
    textbook, textbook_lse = same_precision(spec, q, k, v, **given)
    allowed = tolerance(expected, textbook)
    error = float((o.double() - expected).abs().max()) if o.numel() else 0.0
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}: {case}"
    bottomless = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, bottomless), f"rows without keys differ: {case}"
    if lse.numel():
        some = ~bottomless
        atol = 2e-5
        if case.score and some.any():
            # Functions in a score may be as inexact as the textbook's rounded Q K^T; or as an eighth of a
            # unit in its last place, since where there are few it may be exact by chance.
            rounded = 2 * float((textbook_lse[some] - expected_lse[some]).abs().max())
            unit = torch.finfo(q.dtype).eps * float(expected_lse[some].abs().max())
            atol = max(atol, rounded, unit / 8)
        torch.testing.assert_close(lse[some].double(), expected_lse[some], rtol=1e-5, atol=atol)
    empty = ~expected.any(-1)  # with a sink too
    assert not o[empty].any(), f"a row without keys is not zero: {case}"


__all__ = [
    "CASES",
    "GALLERY_CASES",
    "HEAD_DIMS",
    "LAYOUTS",
    "LENGTHS",
    "MASKS",
    "Case",
    "assert_exact",
    "laid_out",
    "random_case",
]
