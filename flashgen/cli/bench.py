"""`flashgen bench`: the kernel beside its peers, on this machine's GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashgen.cli.arguments import json_option, specs_argument, torch_needed
from flashgen.cli.terminal import console, new_table, pair, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from flashgen.explore.bench import Comparison


@click.command()
@specs_argument
@click.option(
    "--seqlen", "seqlens", metavar="N", type=click.IntRange(min=1), multiple=True,
    help="Instead of the spec's own length, at the same number of tokens; may be given several times.",
)  # fmt: skip
@click.option("--batch", metavar="N", type=click.IntRange(min=1), help="Instead of the spec's batch.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="A multiple of the implementations balances who follows whom.",
)
@click.option(
    "--rest",
    metavar="SECONDS",
    type=click.FloatRange(min=0, max=60),
    default=0.0,
    help="Before each sample: a rested chip runs at a higher clock.",
)
@click.option(
    "--peers", metavar="A,B,..", help="Only these: cudnn, flash, efficient, fa3, fa4, flashinfer, flex."
)
@json_option
def bench(
    spec_files: tuple[Path, ...],
    seqlens: tuple[int, ...],
    batch: int | None,
    rounds: int,
    rest: float,
    peers: str | None,
    as_json: bool,
) -> None:
    """Time the kernel beside its peers, interleaved in one run.

    The peers are torch's SDPA backends, and FA3, FA4, FlashInfer and FlexAttention where importable.
    """
    torch_needed()
    import torch

    from flashgen.explore.bench import compare, matmul_tflops, require_gpu
    from flashgen.explore.peers import PEERS
    from flashgen.spec import load_spec

    names = tuple(PEERS) if peers is None else tuple(name for name in peers.split(",") if name)
    if unknown := [name for name in names if name not in PEERS]:
        raise click.BadParameter(f"{', '.join(unknown)}: not among {', '.join(PEERS)}", param_hint="--peers")
    specs = [load_spec(path) for path in spec_files]
    require_gpu()
    rate = matmul_tflops()
    device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "matmul_tflops": rate}
    if not as_json:
        click.echo(f"{device['gpu']}, torch {device['torch']}, bf16 matmul {rate:.0f} TFLOP/s")
    results = []
    for spec in specs:
        work = spec.workload
        for seqlen in seqlens or (None,):
            shape = (work.seqlen_q, work.seqlen_kv) if seqlen is None else (seqlen, seqlen)
            size = batch or (work.batch if seqlen is None else max(1, work.batch * work.seqlen_q // seqlen))
            comparison = compare(spec, size, *shape, rounds=rounds, rest_s=rest, peers=names)
            results.append(_to_dict(comparison))
            if not as_json:
                console().print(_table(comparison))
    if as_json:
        print_json({"device": device, "rounds": rounds, "rest_s": rest, "results": results})


def _to_dict(comparison: Comparison) -> dict[str, Any]:
    from dataclasses import asdict

    case = comparison.case
    return {
        "spec": case.spec.name,
        "batch": case.work.batch,
        "seqlen": {"q": case.work.seqlen_q, "kv": case.work.seqlen_kv},
        "flops": case.work.flops,
        "timings": [asdict(timing) for timing in comparison.timings],
        "missing": dict(comparison.missing),
    }


def _table(comparison: Comparison) -> Table:
    spec, work = comparison.case.spec, comparison.case.work
    lengths = pair(work.seqlen_q, work.seqlen_kv)
    attention = spec.attention
    what = filter(None, (attention.mask_label, attention.score_label, "sink" if attention.sink else ""))
    table = new_table(
        "", "ms", "TFLOP/s", "of flashgen's", "error", "",
        title=f"{spec.name}: {', '.join(what)}, batch {work.batch}, seqlen {lengths}",
        title_justify="left",
    )  # fmt: skip
    for column in table.columns[1:5]:
        column.justify = "right"
    ours = next((timing for timing in comparison.timings if timing.name == "flashgen"), None)
    for timing in sorted(comparison.timings, key=lambda timing: timing.ms):
        table.add_row(
            timing.name,
            f"{timing.ms:.4f}",
            f"{timing.tflops:.1f}",
            f"{timing.tflops / ours.tflops:.2f}x" if ours and ours.tflops else "",
            f"{timing.error:.1e}",
            "" if timing.in_graph else "with host time: not captured in a graph",
        )
    for name, reason in comparison.missing.items():
        table.add_row(name, "", "", "", "", reason)
    return table
