"""`flashgen plan`: the solution and its reasons. `flashgen render`: its source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashgen.cli.arguments import json_option, read_spec, spec_argument, target_option
from flashgen.cli.terminal import console, new_table, pair, print_json, size

if TYPE_CHECKING:
    from rich.table import Table

    from flashgen.arch import Arch
    from flashgen.plan import IoModel, KernelPlan, Ranking
    from flashgen.plan.explain_mask import MaskExplanation
    from flashgen.spec import AttentionSpec


@click.command()
@spec_argument
@target_option
@click.option("--all", "show_all", is_flag=True, help="Also rank every legal tiling by its predicted time.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw the tiles: skipped, full, masked. A .png or .svg.",
)
@json_option
def plan(spec_file: Path, target: str | None, show_all: bool, picture: Path | None, as_json: bool) -> None:
    """Solve for the tiles that fit the chip, and say why."""
    spec, arch = read_spec(spec_file, target)

    from flashgen.plan import IoModel, Workload, rank
    from flashgen.plan.explain_mask import explain_mask

    ranking = rank(spec, arch)
    best, work = ranking.best, Workload.of(spec)
    io, mask = IoModel.of_plan(work, best), explain_mask(best, work)
    if picture is not None:
        from flashgen.explore.picture import draw_tiles

        draw_tiles(best, work, picture)
    if as_json:
        answer: dict[str, Any] = {"plan": best.to_dict(), "bytes": io.to_dict(), "mask": mask.to_dict()}
        print_json(answer | ranking.to_dict() if show_all else answer)
        return
    terminal = console()
    for line in _heading(spec, best, arch):
        click.echo(line)
    tables = (_mathematics(best, mask), _constraints(best), _neighbours(best), _prediction(best), _bytes(io))
    for table in tables:
        click.echo()
        terminal.print(table)
    if show_all:
        click.echo()
        terminal.print(_ranking(ranking))


@click.command()
@spec_argument
@target_option
@click.option(
    "--standalone", is_flag=True, help="One file that `nvcc -arch=...` compiles with no include path."
)
def render(spec_file: Path, target: str | None, standalone: bool) -> None:
    """Print the CUDA source of a spec's kernel."""
    spec, arch = read_spec(spec_file, target)

    from flashgen.codegen import render, render_standalone
    from flashgen.plan import solve

    solution = solve(spec, arch)
    click.echo(render_standalone(solution) if standalone else render(solution).text, nl=False)


def _heading(spec: AttentionSpec, plan: KernelPlan, arch: Arch) -> Iterator[str]:
    attention, work = spec.attention, spec.workload
    heads = attention.heads
    dims = attention.head_dim
    yield (
        f"{spec.name}: {attention.mask_label}, {attention.dtype}, heads {pair(heads.q, heads.kv)}, "
        f"head_dim {pair(dims.qk, dims.v)}, batch {work.batch}, seqlen {pair(work.seqlen_q, work.seqlen_kv)}"
    )
    yield f"{plan.kernel} on {arch.target}, {arch.title}"
    yield ""
    schedule = schedule_words(plan)
    yield (
        f"tile_q {plan.tile_q}   tile_kv {plan.tile_kv}   stages {plan.stages}   warps {plan.warps}   "
        f"family {plan.family}{f' ({schedule})' if schedule else ''}   blocks/SM {plan.blocks_per_sm}"
    )
    yield f"{plan.why.origin}; bound by {plan.why.binding}"
    for name, text in plan.why.measured:
        yield f"{name}: {text}"


def _mathematics(plan: KernelPlan, mask: MaskExplanation) -> Table:
    """Mask and score, and what was derived from them."""
    from flashgen.plan.operations import of_score
    from flashgen.spec.printer import to_text

    table = new_table("mask", mask.condition)
    table.add_row(f"route: {mask.route}", mask.reason)
    if mask.condition != "true":
        for first, last in mask.keys:
            table.add_row("keys of a row", f"from {first} to {last}")
    if mask.residual != "true":
        table.add_row("of these", mask.residual)
    shares = f"{mask.skipped:.1%} skipped, {mask.full:.1%} full, {mask.partial:.1%} partial"
    table.add_row("tiles of a head", f"{shares}, of {mask.tiles:,}")
    if mask.caveat:
        table.add_row("", mask.caveat)
    if plan.score.label:
        each = of_score(plan.score.expr)
        table.add_row("score", to_text(plan.score.expr))
        table.add_row(
            "", f"for each element, about {each.plain:.0f} instructions and {each.mufu:.0f} of MUFU"
        )
    if plan.sink:
        table.add_row("sink", "a logit of each head joins the softmax")
    return table


def _constraints(plan: KernelPlan) -> Table:
    table = new_table("constraint", "used / allowed")
    for row in plan.why.slack:
        table.add_row(*row)
    return table


def _neighbours(plan: KernelPlan) -> Table:
    table = new_table("instead", "why not")
    for row in plan.why.rejected:
        table.add_row(*row)
    return table


def _prediction(plan: KernelPlan) -> Table:
    """The cost model's terms; the pipes' times are what each would take alone."""
    cost = dict(plan.why.cost)
    table = new_table("predicted", "")
    table.add_row("time", f"{cost['seconds'] * 1e3:.3f} ms, {cost['tflops']:.0f} TFLOP/s")
    pipes = {
        "tensor cores": "tensor_s",
        "softmax": "softmax_s",
        "shared memory": "smem_s",
        "L2": "l2_s",
        "HBM": "hbm_s",
    }
    table.add_row("each alone", ", ".join(f"{name} {cost[key] * 1e3:.3f} ms" for name, key in pipes.items()))
    table.add_row("waves over the SMs", f"{cost['waves']:.2f}")
    table.add_row(
        "kv tiles of a head", f"{cost['tiles_visited']:,.0f} visited, {cost['tiles_masked']:,.0f} masked"
    )
    table.add_row("bytes from HBM, from L2", f"{size(cost['hbm_bytes'])}, {size(cost['l2_bytes'])}")
    return table


def _bytes(io: IoModel) -> Table:
    titles = {
        "compulsory": "every tensor once",
        "rereads_miss": "K and V again for each q tile",
        "standard": "standard attention",
        "lower_bound": "lower bound, up to a constant",
    }
    table = new_table("I/O model", "bytes", "")
    table.columns[1].justify = "right"
    for name, entry in io.to_dict().items():
        if isinstance(entry, dict):
            table.add_row(titles[name], size(entry["bytes"]), str(entry["expression"]))
    table.add_row(
        "", "", f"M = {io.sram_elements:,} elements of shared memory, d^2 = {io.crossover_elements:,}"
    )
    return table


def _ranking(ranking: Ranking) -> Table:
    table = new_table(
        "", "tile_q", "tile_kv", "stages", "warps", "schedule", "shared memory", "registers", "blocks/SM"
    )
    table.add_column("HBM")
    table.add_column("ms")
    table.add_column("TFLOP/s")
    for column in table.columns:
        column.justify = "left" if column.header == "schedule" else "right"
    for place, candidate in enumerate(ranking.candidates, 1):
        plan, cost = candidate.plan, candidate.cost
        table.add_row(
            str(place), str(plan.tile_q), str(plan.tile_kv), str(plan.stages), str(plan.warps),
            schedule_words(plan),
            f"{plan.smem_bytes:,} B", str(plan.registers), str(plan.blocks_per_sm), size(cost.hbm_bytes),
            f"{cost.seconds * 1e3:.3f}", f"{cost.tflops:.0f}",
        )  # fmt: skip
    return table


def schedule_words(plan: KernelPlan) -> str:
    """The schedule's fields that are not at their defaults."""
    words = []
    for entry in fields(plan.schedule):
        value = getattr(plan.schedule, entry.name)
        if value != entry.default:
            words.append(
                entry.name
                if value is True
                else f"no {entry.name}"
                if value is False
                else f"{entry.name}={value}"
            )
    return ", ".join(words)
