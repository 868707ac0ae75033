"""Forward TFLOP/s beside the peers over head dimensions, masks and lengths, as a Markdown table.

The grid that FlashAttention's papers use: 16k tokens in all, hidden size 2048, bf16.

    python benchmarks/forward.py [--family sm80] [--head-dim 128] [--mask causal] [--seqlen 2048] [--json F]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch

from flashgen.explore.bench import Comparison, compare, matmul_tflops, require_gpu
from flashgen.explore.peers import PEERS
from flashgen.spec import AttentionSpec, parse_spec

TOKENS = 16384
HIDDEN = 2048


def spec_of(head_dim: int, mask: str, dtype: str, seqlen: int, family: str | None) -> AttentionSpec:
    """The spec of one cell of the grid."""
    tiles = f"{{schedule: {{family: {family}}}}}" if family else "auto"
    return parse_spec(
        f"""
flashgen: 1
name: d{head_dim}-{mask}
attention:
  heads: {HIDDEN // head_dim}
  head_dim: {head_dim}
  dtype: {dtype}
  mask: {mask}
passes: [forward]
workload: {{batch: {max(1, TOKENS // seqlen)}, seqlen: {seqlen}}}
tiles: {tiles}
""",
        filename=f"<d{head_dim}-{mask}>",
    )


def row(comparison: Comparison, names: list[str]) -> tuple[str, float | None]:
    """One line of the table, and flashgen's speed relative to the best peer."""
    tflops = {timing.name: timing.tflops for timing in comparison.timings}
    peers = [value for name, value in tflops.items() if name != "flashgen"]
    ratio = tflops["flashgen"] / max(peers) if peers and "flashgen" in tflops else None
    cells = [f"{tflops[name]:.0f}" if name in tflops else "" for name in names]
    return " | ".join([*cells, f"{ratio:.2f}" if ratio else ""]), ratio


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--family", choices=["sm80", "sm90"], help="the kernel family (default: the solver's choice)"
    )
    parser.add_argument("--head-dim", type=int, action="append", help="default: 64, 128, 256")
    parser.add_argument("--mask", choices=["full", "causal"], action="append", help="default: both")
    parser.add_argument("--seqlen", type=int, action="append", help="default: 512 to 16384")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--peers", default="cudnn,flash,fa3,fa4", help=f"of: {','.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rest", type=float, default=0.0, help="seconds before each sample")
    parser.add_argument("--json", type=Path, help="also write all timings to this file")
    arguments = parser.parse_args()
    require_gpu()

    names = ["flashgen", *arguments.peers.split(",")]
    rate = matmul_tflops()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16 matmul {rate:.0f} TFLOP/s\n")
    print(" | ".join(["head_dim", "mask", "seqlen", *names, "of the best peer"]))
    print(" | ".join(["---"] * (len(names) + 4)), flush=True)
    results, ratios = [], []
    for head_dim in arguments.head_dim or (64, 128, 256):
        for mask in arguments.mask or ("full", "causal"):
            for seqlen in arguments.seqlen or (512, 1024, 2048, 4096, 8192, 16384):
                spec = spec_of(head_dim, mask, arguments.dtype, seqlen, arguments.family)
                comparison = compare(
                    spec,
                    spec.workload.batch,
                    seqlen,
                    seqlen,
                    rounds=arguments.rounds,
                    rest_s=arguments.rest,
                    peers=names[1:],
                )
                cells, ratio = row(comparison, names)
                print(f"{head_dim} | {mask} | {seqlen} | {cells}", flush=True)
                if ratio:
                    ratios.append(ratio)
                timings = [dataclasses.asdict(timing) for timing in comparison.timings]
                results.append(
                    {"head_dim": head_dim, "mask": mask, "seqlen": seqlen, "timings": timings}
                    | {"missing": dict(comparison.missing)}
                )
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"\nof the best peer, {len(ratios)} cells: geometric mean {mean:.3f}, worst {min(ratios):.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"matmul_tflops": rate, "cells": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
