"""`flashgen build`: specs to folders of source, cubin and manifest."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashgen.cli.arguments import json_option, read_spec, specs_argument, target_option
from flashgen.cli.terminal import console, new_table, print_json
from flashgen.errors import FlashgenError, SpecError

if TYPE_CHECKING:
    from flashgen.spec import AttentionSpec


@dataclass(frozen=True)
class Report:
    """What building one spec came to."""

    name: str
    kernel: str
    target: str
    folder: str
    registers: int  # per thread
    spill_bytes: int
    smem_bytes: int  # per block
    seconds: float  # from spec to folder
    warnings: tuple[str, ...]  # where the compiler's report breaks the plan
    differences: tuple[str, ...]  # with --check: lines that say what would change


@click.command()
@specs_argument
@target_option
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), default="generated", show_default=True)
@click.option(
    "--check", is_flag=True, help="Write nothing; fail if the files in DIR differ from what would be written."
)
@json_option
def build(spec_files: tuple[Path, ...], target: str | None, out: Path, check: bool, as_json: bool) -> None:
    """Compile specs into folders. Needs no GPU.

    DIR/<name>/ gets the .cu with its headers, the .cubin and manifest.json. Several specs build in parallel.
    """
    _read_all(spec_files, target)
    reports: list[Report] = []
    errors: list[FlashgenError] = []
    for result in _build_all(spec_files, target, out, check, show_progress=not as_json):
        if isinstance(result, Report):
            reports.append(result)
        else:
            errors.append(result)
    reports.sort(key=lambda report: report.name)
    if as_json:
        print_json([asdict(report) for report in reports])
    else:
        _print(reports, check)
    if errors:
        worst = max(errors, key=lambda error: error.exit_code)
        raise type(worst)([problem for error in errors for problem in error.problems])
    if any(report.differences for report in reports):
        click.echo(
            "error: the committed kernels are not what the specs give; `flashgen build` writes them", err=True
        )
        raise click.exceptions.Exit(1)


def _read_all(spec_files: tuple[Path, ...], target: str | None) -> list[AttentionSpec]:
    """All specs, or one error with the mistakes of all: nothing is built before every spec is right."""
    specs: list[AttentionSpec] = []
    errors: list[SpecError] = []
    for path in spec_files:
        try:
            specs.append(read_spec(path, target)[0])
        except SpecError as error:
            errors.append(error)
    if errors:
        raise SpecError([problem for error in errors for problem in error.problems])
    seen: dict[str, Path] = {}
    for spec, path in zip(specs, spec_files, strict=True):
        if spec.name in seen:
            raise SpecError(
                f"{path} and {seen[spec.name]} are both named {spec.name!r}: they would share a folder",
                location=spec.locate("name"),
            )
        seen[spec.name] = path
    return specs


def _build_all(
    spec_files: tuple[Path, ...], target: str | None, out: Path, check: bool, *, show_progress: bool
) -> Iterator[Report | FlashgenError]:
    """Build each spec, several at a time, in the order in which they finish."""
    import multiprocessing
    import os
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if len(spec_files) == 1:
        yield _build_one(spec_files[0], target, out, check)
        return
    columns = (
        TextColumn("building"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    terminal = console(stderr=True)
    with (
        Progress(
            *columns, console=terminal, transient=True, disable=not (show_progress and terminal.is_terminal)
        ) as bar,
        # spawned, not forked: a forked child inherits the locks of threads that it does not have
        ProcessPoolExecutor(
            min(len(spec_files), os.cpu_count() or 1), multiprocessing.get_context("spawn"), _leave_interrupts
        ) as pool,
    ):
        task = bar.add_task("", total=len(spec_files))
        futures = [pool.submit(_build_one, path, target, out, check) for path in spec_files]
        try:
            for future in as_completed(futures):
                result = future.result()
                bar.update(
                    task, advance=1, description=result.name if isinstance(result, Report) else "failed"
                )
                yield result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _leave_interrupts() -> None:
    """Ctrl-C reaches the whole process group; the parent alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _build_one(path: Path, target: str | None, out: Path, check: bool) -> Report | FlashgenError:
    """Spec to folder. Runs in a worker process, so what it finds wrong is returned."""
    import warnings

    from flashgen.build import PlanMismatchWarning
    from flashgen.build import build as compile_plan
    from flashgen.cli import publish
    from flashgen.plan import solve

    started = time.perf_counter()
    try:
        spec, arch = read_spec(path, target)
        plan = solve(spec, arch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PlanMismatchWarning)
            cubin = compile_plan(plan)
        folder = out / spec.name
        extra = publish.describe(spec, plan)
        differences: list[str] = []
        if check:
            differences = publish.differences(cubin, folder, extra)
        else:
            publish.write(cubin, folder, extra)
    except FlashgenError as error:
        return error
    return Report(
        name=spec.name,
        kernel=cubin.kernel,
        target=plan.target,
        folder=str(folder),
        registers=cubin.resources.registers,
        spill_bytes=cubin.resources.spill_bytes,
        smem_bytes=cubin.resources.smem_bytes,
        seconds=round(time.perf_counter() - started, 3),
        warnings=tuple(str(warning.message) for warning in caught),
        differences=tuple(differences),
    )


def _print(reports: list[Report], check: bool) -> None:
    for report in reports:
        for warning in report.warnings:
            click.echo(f"warning: {warning}", err=True)
    if not reports:
        return
    table = new_table("spec", "kernel", "registers", "spills", "shared memory", "time")
    for column in table.columns[2:]:
        column.justify = "right"
    table.add_column("checked" if check else "written to")
    for report in reports:
        table.add_row(
            report.name,
            report.kernel,
            str(report.registers),
            f"{report.spill_bytes} B",
            f"{report.smem_bytes:,} B",
            f"{report.seconds:.2f} s",
            ("differs" if report.differences else "same") if check else report.folder + "/",
        )
    console().print(table)
    for report in reports:
        for line in report.differences:
            print(line, file=sys.stderr)
