"""Choices of a schedule beside the one that is taken, and beside the peers: TFLOP/s, as a Markdown table.

The cells are those of forward.py. Each choice changes the kernel that a cell gets in one or more fields:

    python benchmarks/choices.py --head-dim 128 --mask full --seqlen 4096 --choice tile_order=stream_k \\
        --choice q=192,kv=96,q_stages=1
"""

from __future__ import annotations

import argparse

import torch
import yaml
from forward import spec_of

from flashgen.arch import arch
from flashgen.errors import FlashgenError
from flashgen.explore.bench import compare, matmul_tflops, require_gpu
from flashgen.explore.proposals import changed
from flashgen.plan import solve
from flashgen.runtime import load
from flashgen.runtime.devices import target_of


def fields(choice: str) -> dict[str, object]:
    """`q=192,overlap=false` as a mapping."""
    pairs = (pair.partition("=") for pair in choice.split(","))
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, action="append", required=True)
    parser.add_argument("--mask", choices=["full", "causal"], action="append", required=True)
    parser.add_argument("--seqlen", type=int, action="append", required=True)
    parser.add_argument("--choice", action="append", required=True, help="field=value[,field=value...]")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--peers", default="cudnn,fa3,fa4")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    require_gpu()
    target = target_of(torch.device("cuda"))
    peers = arguments.peers.split(",") if arguments.peers else []
    names = ["flashgen", *arguments.choice, *peers]
    print(f"{torch.cuda.get_device_name()}, bf16 matmul {matmul_tflops():.0f} TFLOP/s\n")
    print(" | ".join(["head_dim", "mask", "seqlen", *names]))
    print(" | ".join(["---"] * (len(names) + 3)), flush=True)
    for head_dim in arguments.head_dim:
        for mask in arguments.mask:
            for seqlen in arguments.seqlen:
                spec = spec_of(head_dim, mask, arguments.dtype, seqlen, None)
                plan = solve(spec, arch(target))
                others = {}
                for choice in arguments.choice:
                    try:
                        other = changed(spec, plan, fields(choice))
                        load(other)
                    except FlashgenError as error:
                        print(f"{head_dim} {mask} {seqlen} {choice}: {str(error).partition(chr(10))[0]}")
                    else:
                        others[choice] = other
                comparison = compare(
                    spec,
                    spec.workload.batch,
                    seqlen,
                    seqlen,
                    rounds=arguments.rounds,
                    peers=peers,
                    others=others,
                )
                tflops = {timing.name: f"{timing.tflops:.0f}" for timing in comparison.timings}
                wrong = [t.name for t in comparison.timings if not t.error < 2 * comparison.timings[0].error]
                cells = [tflops.get(name, "") + " (inexact)" * (name in wrong) for name in names]
                print(f"{head_dim} | {mask} | {seqlen} | {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
