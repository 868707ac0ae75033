"""`flashgen tune`: measure the model's best tilings on this machine's GPU, and remember the fastest."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from flashgen.cli.arguments import json_option, specs_argument, torch_needed
from flashgen.cli.terminal import console, new_table, pair, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from flashgen.explore.trials import Hang
    from flashgen.explore.tune import Report, Tuning
    from flashgen.spec import AttentionSpec


@click.command()
@specs_argument
@click.option(
    "--budget", metavar="SECONDS", type=click.FloatRange(min=0), default=20.0, show_default=True,
    help="Of measuring, for each spec and length; building and checking come on top.",
)  # fmt: skip
@click.option(
    "--top", metavar="N", type=click.IntRange(min=1), default=16, show_default=True,
    help="Tilings of the model's ranking to begin with.",
)  # fmt: skip
@click.option(
    "--seqlen", "seqlens", metavar="N", type=click.IntRange(min=1), multiple=True,
    help="Instead of the spec's own length, at the same number of tokens; may be given several times.",
)  # fmt: skip
@click.option(
    "--out", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Add to this file instead of your own tunings, which lie beside the cached kernels.",
)  # fmt: skip
@json_option
def tune(
    spec_files: tuple[Path, ...],
    budget: float,
    top: int,
    seqlens: tuple[int, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure the best tilings on this GPU, and use the fastest from then on.

    The top of the solver's ranking, and the neighbours of the best of it, are built in parallel, checked
    against float64, and timed interleaved as replays of CUDA graphs. The winner speaks for its head dims,
    class of masks and bucket of lengths, wherever a spec leaves its tiles open.
    """
    torch_needed()
    import torch

    from flashgen.explore.trials import Hang
    from flashgen.explore.tune import require_target
    from flashgen.explore.tune import tune as search
    from flashgen.plan.tuned import Tunings, read, require_writable, user_path, write
    from flashgen.spec import load_spec

    if not math.isfinite(budget):
        raise click.BadParameter(f"{budget} is no number of seconds", param_hint="--budget")
    specs = [load_spec(path) for path in spec_files]
    (target,) = {require_target(spec) for spec in specs}
    path = out if out is not None else user_path(target)
    gpu = torch.cuda.get_device_name()
    file = read(path) or Tunings(target=target, gpu=gpu, entries=())
    if file.target != target:
        raise click.UsageError(f"{path} holds tunings for {file.target}, and this GPU is {target}")
    require_writable(path)
    results = []
    for spec in specs:
        for seqlen in seqlens or (None,):
            asked = spec if seqlen is None else _at_length(spec, seqlen)
            try:
                with _progress(f"{spec.name}, seqlen {_lengths(asked)}", show=not as_json) as report:
                    tuning = search(asked, budget=budget, top=top, report=report)
            except Hang as hang:
                _end(hang)
            # after each, so that what was measured stays when a later one fails
            file = file.with_entries([tuning.tuned]).model_copy(update={"gpu": gpu})
            write(path, file)
            results.append(_to_dict(tuning))
            if not as_json:
                console().print(_table(tuning))
                click.echo(_summary(tuning))
    if as_json:
        print_json({"gpu": gpu, "target": target, "file": str(path), "results": results})
    else:
        click.echo(f"written to {path}")


def _at_length(spec: AttentionSpec, seqlen: int) -> AttentionSpec:
    from flashgen.spec.model import Seqlen, Workload

    work = spec.workload
    batch = max(1, work.batch * work.seqlen_q // seqlen)
    return spec.model_copy(update={"workload": Workload(batch=batch, seqlen=Seqlen(q=seqlen, kv=seqlen))})


def _lengths(spec: AttentionSpec) -> str:
    return pair(spec.workload.seqlen_q, spec.workload.seqlen_kv)


@contextmanager
def _progress(title: str, *, show: bool) -> Iterator[Report]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    terminal = console(stderr=True)
    columns = (
        TextColumn("{task.fields[title]}: {task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=terminal, transient=True, disable=not (show and terminal.is_terminal)
    ) as bar:
        task = bar.add_task("", total=None, title=title)

        def report(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of or None)

        yield report


def _end(hang: Hang) -> NoReturn:
    """Leave without any further wait on the GPU: unloading CUDA would wait for the kernel."""
    click.echo(f"error: {hang}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(hang.exit_code)


def _table(tuning: Tuning) -> Table:
    from flashgen.cli.plan import schedule_words

    work = tuning.work
    table = new_table(
        "", "tile_q", "tile_kv", "stages", "schedule", "predicted", "TFLOP/s", "",
        title=f"{tuning.spec.name}: batch {work.batch}, seqlen {pair(work.seqlen_q, work.seqlen_kv)}",
        title_justify="left",
    )  # fmt: skip
    for column in table.columns:
        column.justify = "left" if column.header == "schedule" else "right"
    table.columns[-1].justify = "left"
    for place, outcome in enumerate(tuning.outcomes, 1):
        plan, measured = outcome.plan, tuning.tflops(outcome)
        table.add_row(
            str(place), str(plan.tile_q), str(plan.tile_kv), str(plan.stages), schedule_words(plan),
            f"{outcome.candidate.cost.tflops:.0f}",
            "" if measured is None else f"{measured:.1f}", outcome.failure or "",
        )  # fmt: skip
    return table


def _summary(tuning: Tuning) -> str:
    best = tuning.tuned
    correlation = "" if best.rank_correlation is None else f", rank correlation {best.rank_correlation:+.2f}"
    return (
        f"{best.tile_q} x {best.tile_kv}: {best.tflops:.1f} TFLOP/s, the best of {best.tried}; "
        f"the model's choice is {100 * best.regret:.1f}% slower{correlation}; {tuning.seconds:.0f} s"
    )


def _to_dict(tuning: Tuning) -> dict[str, Any]:
    work = tuning.work
    return {
        "spec": tuning.spec.name,
        "batch": work.batch,
        "seqlen": {"q": work.seqlen_q, "kv": work.seqlen_kv},
        "seconds": round(tuning.seconds, 1),
        "tuned": tuning.tuned.model_dump(),
        "tried": [
            {
                "plan": outcome.plan.to_dict(),
                "predicted_tflops": outcome.candidate.cost.tflops,
                "tflops": tuning.tflops(outcome),
                "failure": outcome.failure,
            }
            for outcome in tuning.outcomes
        ],
    }
