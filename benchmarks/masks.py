"""Masks and scores beside FlexAttention and FlashAttention 4: forward milliseconds, as a Markdown table.

batch 2, 16 heads, 8192 tokens, head_dim 128, bf16. All implementations of a row run in one process on the
same tensors, interleaved; what is timed are replays of CUDA graphs. Preparation is what depends on the mask
and its tensors but not on q, k and v: FlexAttention's block mask, flashgen's ranges or map.

    python benchmarks/masks.py [--row softcap] [--rounds 5] [--json F]
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flashgen
from flashgen.explore.bench import interleave, require_gpu
from flashgen.runtime.reference import reference
from flashgen.spec import AttentionSpec

BATCH, HEADS, SEQLEN, HEAD_DIM = 2, 16, 8192, 128
DOCUMENTS = 8

Index = Tensor


@dataclass(frozen=True)
class Row:
    """One mask and score, said to each implementation in its own words."""

    name: str
    mask: str | dict[str, int] = "full"
    score: str | None = None
    declared: dict[str, Any] = field(default_factory=dict)  # tensors that are not the gallery's
    tensors: dict[str, Tensor] = field(default_factory=dict)
    flex_mask: Callable[[Index, Index, Index, Index], Tensor] | None = None
    flex_score: Callable[[Tensor, Index, Index, Index, Index], Tensor] | None = None
    fa4: dict[str, Any] | None = None

    def spec(self) -> AttentionSpec:
        """As flashgen reads it."""
        attention: dict[str, Any] = {"heads": HEADS, "head_dim": HEAD_DIM, "mask": self.mask}
        if self.score:
            attention["score"] = self.score
        if self.declared:
            attention["tensors"] = self.declared
        return AttentionSpec(
            name=self.name.replace(" ", "-"),
            attention=attention,
            workload={"batch": BATCH, "seqlen": SEQLEN},
        )


def rows() -> list[Row]:
    """The table of the masks and scores that people use."""
    device = torch.device("cuda")
    ends = torch.randperm(SEQLEN - 1, device=device)[: DOCUMENTS - 1] + 1
    doc = (torch.arange(SEQLEN, device=device)[:, None] >= ends).sum(1).int().expand(BATCH, -1).contiguous()
    shuffled = torch.randperm(DOCUMENTS, device=device)[doc.long()].int().contiguous()
    slope = torch.exp2(-torch.arange(1, HEADS + 1, device=device, dtype=torch.float32) / 2)
    distance = torch.randn(HEADS, 2 * SEQLEN - 1, device=device)

    def causal(b: Index, h: Index, q: Index, kv: Index) -> Tensor:
        return q >= kv

    unsorted = {"doc": {"index": ["batch", "kv"], "dtype": "int32"}}
    same_document = "kv <= q and doc[q] == doc[kv]"
    return [
        Row("full", fa4={}),
        Row("causal", "causal", flex_mask=causal, fa4={"causal": True}),
        Row(
            "window 1024",
            {"window": 1024},
            flex_mask=lambda b, h, q, kv: (q >= kv) & (q - kv < 1024),
            fa4={"causal": True, "window_size": (1023, 0)},
        ),
        Row("prefix 2048", "prefix_lm(2048)", flex_mask=lambda b, h, q, kv: (kv <= q) | (kv < 2048)),
        Row(
            "document",
            "causal and document",
            tensors={"doc": doc},
            flex_mask=lambda b, h, q, kv: (q >= kv) & (doc[b, q] == doc[b, kv]),
        ),
        Row(
            "document unsorted",
            same_document,
            declared=unsorted,
            tensors={"doc": shuffled},
            flex_mask=lambda b, h, q, kv: (q >= kv) & (shuffled[b, q] == shuffled[b, kv]),
        ),
        Row(
            "dilated 2",
            "kv <= q and (q - kv) % 2 == 0",
            flex_mask=lambda b, h, q, kv: (q >= kv) & ((q - kv) % 2 == 0),
        ),
        Row(
            "softcap 30",
            "causal",
            "softcap(30)",
            flex_mask=causal,
            flex_score=lambda s, b, h, q, kv: 30.0 * torch.tanh(s / 30.0),
            fa4={"causal": True, "softcap": 30.0},
        ),
        Row(
            "alibi",
            "causal",
            "alibi",
            tensors={"slope": slope},
            flex_mask=causal,
            flex_score=lambda s, b, h, q, kv: s + slope[h] * (kv - q),
        ),
        Row(
            "relative bias",
            "full",
            "relative_bias",
            tensors={"distance_bias": distance},
            flex_score=lambda s, b, h, q, kv: s + distance[h, q - kv + SEQLEN - 1],
        ),
    ]


def relative_error(spec: AttentionSpec, tensors: dict[str, Tensor], kernel: flashgen.Kernel) -> float:
    """||o - o64|| / ||o64|| on a shorter problem of the same kind."""
    q, k, v = (torch.randn(1, 2048, HEADS, HEAD_DIM, device="cuda").bfloat16() for _ in range(3))
    short = {}
    for name, tensor in tensors.items():
        cut = tensor[:1, :2048] if name == "doc" else tensor
        short[name] = cut[:, SEQLEN - 2048 : SEQLEN + 2047].contiguous() if name == "distance_bias" else cut
    expected, _ = reference(spec, q, k, v, tensors=short)
    output = kernel(q, k, v, tensors=short or None)
    assert isinstance(output, Tensor)
    return float((output.double() - expected).norm() / expected.norm())


def measure(row: Row, rounds: int) -> dict[str, float | str]:
    """One row of the table."""
    q, k, v = (torch.randn(BATCH, SEQLEN, HEADS, HEAD_DIM, device="cuda").bfloat16() for _ in range(3))
    spec = row.spec()
    kernel = flashgen.load(spec)
    tensors = row.tensors or None
    error = relative_error(spec, row.tensors, kernel)
    prepared = kernel.prepare(q, k, v, tensors=tensors)
    calls: dict[str, Callable[[], object]] = {
        "flashgen": lambda: kernel(q, k, v, tensors=tensors, prepared=prepared)
    }
    if kernel.plan.preparation:
        calls["preparation"] = lambda: kernel.prepare(q, k, v, tensors=tensors)

    q_first, k_first, v_first = (tensor.transpose(1, 2).contiguous() for tensor in (q, k, v))
    flex: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if row.flex_mask is not None:
        make: Callable[..., Any] = torch.compile(create_block_mask, dynamic=False)
        sizes = (BATCH if row.name.startswith("document") else None, None, SEQLEN, SEQLEN)
        block_mask = make(row.flex_mask, *sizes)
        calls["block mask"] = lambda: make(row.flex_mask, *sizes)
    calls["flex"] = lambda: flex(q_first, k_first, v_first, score_mod=row.flex_score, block_mask=block_mask)
    if row.fa4 is not None:
        options = row.fa4
        try:
            fa4 = importlib.import_module("flash_attn.cute").flash_attn_func
            fa4(q, k, v, **options)
            calls["fa4"] = lambda: fa4(q, k, v, **options)
        except Exception as failure:  # a peer that is missing, or that cannot do this, has an empty cell
            print(f"fa4: {type(failure).__name__}: {str(failure)[:100]}")
    result: dict[str, float | str] = {"row": row.name, "error": error, "plan": _plan(kernel)}
    times, _ = interleave(calls, rounds)
    return result | times


def _plan(kernel: flashgen.Kernel) -> str:
    plan = kernel.plan
    return f"{plan.tile_q}x{plan.tile_kv} {plan.mask.derivation.route}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    columns = ["flashgen", "preparation", "flex", "block mask", "fa4"]
    print(" | ".join(["row", *columns, "flex / flashgen", "error", "plan"]))
    print(" | ".join(["---"] * (len(columns) + 4)), flush=True)
    results = []
    for row in rows():
        if arguments.row and row.name not in arguments.row:
            continue
        found = measure(row, arguments.rounds)
        results.append(found)
        cells = [f"{found[name]:.3f}" if name in found else "" for name in columns]
        ratio = float(found["flex"]) / float(found["flashgen"])
        print(
            " | ".join([row.name, *cells, f"{ratio:.2f}", f"{found['error']:.1e}", str(found["plan"])]),
            flush=True,
        )
        torch.compiler.reset()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
