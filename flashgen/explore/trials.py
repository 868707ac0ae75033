"""Kernels tried on a GPU: checked at small odd shapes, then timed against one another, under a watchdog.

A kernel that is not done after some seconds never will be, and nothing short of ending the process takes it
off the GPU: `Hang` says which it was.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashgen.errors import LaunchError
from flashgen.explore.inputs import Samples, random_inputs, sample_inputs
from flashgen.plan import KernelPlan, Workload
from flashgen.runtime import Kernel, reference, same_precision, tolerance
from flashgen.runtime.inputs import Inputs, arrange
from flashgen.runtime.launch import Launch
from flashgen.runtime.parameters import counter_words
from flashgen.spec import AttentionSpec

WATCHDOG_S = 5.0
SAMPLE_MS = 60.0  # so long that a kernel runs at the clock that its own power leaves it
ROUNDS = (5, 40)  # at least, at most
# (batch, seqlen_q, seqlen_kv): tiles cut on both sides, rows without any key, one key, tiles worth sharing
CHECKED_SHAPES = ((2, 333, 515), (1, 300, 77), (1, 65, 1), (1, 300, 4000))


class Hang(LaunchError):
    """A kernel did not finish. The process must end: every further wait on the GPU would last for ever."""


@dataclass(frozen=True)
class Trial:
    """One plan, loaded, with a tile counter of its own: those of captured launches are not given back."""

    plan: KernelPlan
    kernel: Kernel
    counter: torch.Tensor  # int32, zero between launches

    @classmethod
    def of(cls, spec: AttentionSpec, plan: KernelPlan) -> Trial:
        """Load a plan that has been built. Raises LaunchError where the driver refuses it."""
        sms = torch.cuda.get_device_properties("cuda").multi_processor_count
        zeros = torch.zeros(counter_words(plan, sms), dtype=torch.int32, device="cuda")
        return cls(plan, Kernel(spec, plan=plan), zeros)

    def launch(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Launch:
        """The prepared launch for contiguous tensors like these."""
        prepared = self.kernel.launch_for(q, k, v, inputs)
        assert isinstance(prepared, Launch)
        return prepared

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> Inputs:
        """What the kernel's mask and score read, and what its mask needs, prepared."""
        given = samples.arguments
        inputs = arrange(self.kernel.declared, **given, name=self.plan.spec)
        return replace(inputs, prepared=self.kernel.prepare(q, k, v, **given).tensors)

    def write(
        self, launch: Launch, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, inputs: Inputs
    ) -> None:
        """Launch once, into given outputs."""
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr())
        counter = self.counter.data_ptr()
        launch.write(*pointers, o, lse, self.plan.scale, counter=counter, inputs=inputs)


def check(trial: Trial, spec: AttentionSpec) -> str | None:
    """Hold a kernel against float64 at small odd shapes, its outputs poisoned with NaN beforehand.

    Returns None, or what is wrong: the first error that is more than `tolerance` allows. Raises Hang.
    """
    work = Workload.of(spec)
    heads_kv = 2
    heads_q = heads_kv * trial.plan.group
    for batch, seqlen_q, seqlen_kv in CHECKED_SHAPES:
        small = replace(
            work, batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, heads_q=heads_q, heads_kv=heads_kv
        )
        q, k, v = random_inputs(small, "cuda")
        o = torch.full(
            (batch, seqlen_q, small.heads_q, small.head_dim_v), torch.nan, dtype=q.dtype, device="cuda"
        )
        lse = torch.full((batch, small.heads_q, seqlen_q), torch.nan, device="cuda")
        samples = sample_inputs(spec, q, k)
        inputs = trial.inputs(q, k, v, samples)
        trial.write(trial.launch(q, k, v, inputs), q, k, v, o, lse, inputs)
        finish(trial.plan, f"batch {batch}, seqlen {seqlen_q}/{seqlen_kv}")
        expected, expected_lse = reference(spec, q, k, v, **samples.arguments)
        textbook, textbook_lse = same_precision(spec, q, k, v, **samples.arguments)
        allowed = tolerance(expected, textbook)
        error = float((o.double() - expected).abs().max())
        at = f"at batch {batch}, seqlen {seqlen_q}/{seqlen_kv}"
        if not error <= allowed:
            return f"error {error:.1e} {at}; {allowed:.1e} is allowed"
        some = expected_lse.isfinite()
        rounded = float((textbook_lse - expected_lse)[some].abs().max()) if some.any() else 0.0
        if not torch.allclose(lse.double(), expected_lse, rtol=1e-4, atol=max(1e-3, 2 * rounded)):
            return f"lse is wrong {at}"
    return None


def measure(
    trials: Sequence[Trial], work: Workload, seconds: float, done: Callable[[], None] = lambda: None
) -> list[float]:
    """Median milliseconds of each kernel: replays of CUDA graphs, interleaved, each round in another random
    order.

    Rounds go on for about `seconds`, at least five; `done` is called after each. Raises Hang.
    """
    if not trials:
        return []
    until = time.monotonic() + seconds
    q, k, v = random_inputs(work, "cuda")
    o = torch.empty((work.batch, work.seqlen_q, work.heads_q, work.head_dim_v), dtype=q.dtype, device="cuda")
    samples = sample_inputs(trials[0].kernel.spec, q, k)
    given = [trial.inputs(q, k, v, samples) for trial in trials]  # held for as long as the graphs read it
    graphs = [_captured(trial, q, k, v, o, inputs) for trial, inputs in zip(trials, given, strict=True)]
    repeats = [
        max(3, min(500, round(SAMPLE_MS / max(_time(graph, 3, trial.plan), 1e-3))))
        for graph, trial in zip(graphs, trials, strict=True)
    ]
    times: list[list[float]] = [[] for _ in trials]
    order = list(range(len(trials)))
    least, most = ROUNDS
    for number in range(most):
        if number >= least and time.monotonic() > until:
            break
        random.shuffle(order)
        for index in order:
            times[index].append(_time(graphs[index], repeats[index], trials[index].plan))
        done()
    return [statistics.median(own) for own in times]


def finish(plan: KernelPlan, what: str) -> None:
    """Wait for the current stream. Raises Hang, naming the kernel, where it takes more than five seconds."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    _wait(event, plan, what)


def _wait(event: torch.cuda.Event, plan: KernelPlan, what: str) -> None:
    until = time.monotonic() + WATCHDOG_S
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > until:
            tiling = f"tile_q={plan.tile_q}, tile_kv={plan.tile_kv}, stages={plan.stages}, warps={plan.warps}"
            raise Hang(
                f"{plan.kernel} ({tiling}, {plan.schedule}) does not finish: {what}",
                hint="please report it; this process ends, which takes the kernel off the GPU",
            )
        time.sleep(1e-4)


def _captured(
    trial: Trial, q: Tensor, k: Tensor, v: Tensor, o: Tensor, inputs: Inputs
) -> torch.cuda.CUDAGraph:
    launch = trial.launch(q, k, v, inputs)
    trial.write(launch, q, k, v, o, None, inputs)
    finish(trial.plan, "its first launch at the spec's workload")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trial.write(launch, q, k, v, o, None, inputs)
    return graph


def _time(graph: torch.cuda.CUDAGraph, repeats: int, plan: KernelPlan) -> float:
    """Mean milliseconds of one replay over back-to-back replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    _wait(end, plan, "replays of its graph")
    return float(start.elapsed_time(end)) / repeats


__all__ = ["Hang", "Trial", "check", "finish", "measure"]
