"""`flashgen run`: build a kernel, run it, and hold it against the float64 reference."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from flashgen.cli.arguments import json_option, spec_argument, torch_needed
from flashgen.cli.terminal import pair, print_json
from flashgen.errors import LaunchError

if TYPE_CHECKING:
    import torch

    from flashgen.plan import Workload

# What a float64 reference, which computes masked elements too, does in a few seconds on two cores.
CPU_FLOPS = 2e10


@dataclass(frozen=True)
class Outcome:
    """One run, compared. Errors are largest absolute differences from float64, over all elements."""

    spec: str
    kernel: str
    device: str
    batch: int
    seqlen_q: int
    seqlen_kv: int
    reduced: bool  # a smaller workload than the spec's
    error: float
    textbook_error: float  # of the same formula in torch, in the spec's dtype
    tolerance: float  # what `error` may be: twice the textbook's
    milliseconds: float
    tflops: float
    passed: bool


@click.command()
@spec_argument
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seqlen", metavar="N", type=click.IntRange(min=0), help="Instead of the spec's own length.")
@json_option
def run(spec_file: Path, device: Literal["auto", "cpu", "cuda"], seqlen: int | None, as_json: bool) -> None:
    """Run a kernel on random input, and compare with float64.

    Tensors, parameters and sinks of masks and scores are made up: the gallery's own samples, or random.

    On a CPU the interpreter runs the kernel's plan, on a smaller workload. Exits with 1 where the error is
    more than twice that of the same formula in torch in the same precision.
    """
    torch_needed()
    outcome = _run(spec_file, device, seqlen)
    if as_json:
        print_json(asdict(outcome))
    else:
        _print(outcome)
    if not outcome.passed:
        raise click.exceptions.Exit(1)


def _run(spec_file: Path, asked: Literal["auto", "cpu", "cuda"], seqlen: int | None) -> Outcome:
    import torch

    from flashgen.explore.inputs import random_inputs, sample_inputs
    from flashgen.plan import Workload
    from flashgen.runtime import load
    from flashgen.runtime.reference import reference, same_precision, tolerance
    from flashgen.spec import load_spec

    spec = load_spec(spec_file)
    device = _device(asked)
    full = Workload.of(spec)
    if seqlen is not None:
        full = replace(full, seqlen_q=seqlen, seqlen_kv=seqlen)
    work = _fit_for_cpu(full) if device == "cpu" else full
    q, k, v = random_inputs(work, device)
    given = sample_inputs(spec, q, k).arguments
    kernel = load(spec)
    prepared = kernel.prepare(q, k, v, **given) if device == "cuda" and kernel.plan.preparation else None

    def call() -> torch.Tensor:
        output = kernel(q, k, v, prepared=prepared, **given)
        assert isinstance(output, torch.Tensor)
        return output

    output, seconds = _timed(call) if device == "cpu" else (call(), _gpu_seconds(call))
    expected, _ = reference(spec, q, k, v, **given)
    textbook, _ = same_precision(spec, q, k, v, **given)
    allowed = tolerance(expected, textbook)
    error = _largest_difference(output, expected)
    return Outcome(
        spec=spec.name,
        kernel=kernel.plan.kernel,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        batch=work.batch,
        seqlen_q=work.seqlen_q,
        seqlen_kv=work.seqlen_kv,
        reduced=work != full,
        error=error,
        textbook_error=_largest_difference(textbook, expected),
        tolerance=allowed,
        milliseconds=seconds * 1e3,
        tflops=work.flops / seconds / 1e12,
        passed=error <= allowed,
    )


def _device(asked: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise LaunchError(
            "torch sees no NVIDIA GPU here", hint="`flashgen doctor` says why; --device cpu does without"
        )
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return asked


def _fit_for_cpu(work: Workload) -> Workload:
    """One batch, and lengths halved until the work is small."""
    work = replace(work, batch=min(work.batch, 1))
    per_pair = 2 * work.heads_q * (work.head_dim_qk + work.head_dim_v)
    while per_pair * work.seqlen_q * work.seqlen_kv > CPU_FLOPS:
        work = replace(work, seqlen_q=-(-work.seqlen_q // 2), seqlen_kv=-(-work.seqlen_kv // 2))
    return work


def _timed(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    output = call()
    return output, time.perf_counter() - start


def _gpu_seconds(call: Callable[[], torch.Tensor]) -> float:
    """Median over the rounds of the benchmark's timing loop."""
    from flashgen.explore.bench import interleave

    times, _ = interleave({"kernel": call}, rounds=5)
    return times["kernel"] / 1e3


def _largest_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN, should there be one, is passed on: it compares as an error."""
    return float((output.double() - expected).abs().max()) if expected.numel() else 0.0


def _print(outcome: Outcome) -> None:
    lengths = pair(outcome.seqlen_q, outcome.seqlen_kv)
    where = "through the interpreter on the CPU" if outcome.device == "cpu" else f"on {outcome.device}"
    click.echo(f"{outcome.kernel} {where}: batch {outcome.batch}, seqlen {lengths}")
    if outcome.reduced:
        click.echo("a smaller workload than the spec's: on a CPU the interpreter runs the plan, to check it")
    click.echo(f"error      {outcome.error:.3e}   largest difference from float64")
    click.echo(
        f"allowed    {outcome.tolerance:.3e}   twice that of the same formula in torch in this dtype "
        f"({outcome.textbook_error:.3e})"
    )
    click.echo(f"time       {outcome.milliseconds:.3f} ms, {outcome.tflops:.3g} TFLOP/s")
    click.echo("passed" if outcome.passed else "failed: the error is too large")
