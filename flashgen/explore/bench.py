"""Timing one attention beside its peers on one GPU, in one run.

Every implementation gets the same tensors, and the rounds interleave them. The chips are power-limited, and
a kernel starts at the clock that the one before it leaves: 3 to 6% apart, measured on an H200. So the rounds
follow a Latin square in which each implementation comes after each other one equally often, where they are a
multiple of the implementations (of twice as many, where that is odd). What is timed are replays of a CUDA
graph: the kernel without the host's share. Medians over the rounds; two timings of one callable differ by up
to about 2%.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from flashgen.errors import LaunchError
from flashgen.explore.inputs import random_inputs, sample_inputs
from flashgen.explore.peers import PEERS, Case, Unsupported
from flashgen.explore.trials import SAMPLE_MS

if TYPE_CHECKING:
    from flashgen.spec import AttentionSpec


@dataclass(frozen=True)
class Timing:
    """One implementation on one workload."""

    name: str
    ms: float  # median over the rounds, of one call
    tflops: float  # of the kept elements only; multiply-add counts two
    error: float  # ||o - o64|| / ||o64|| over the sampled rows
    in_graph: bool  # False: the calls could not be captured, so the host's time is in `ms`


@dataclass(frozen=True)
class Comparison:
    """All implementations on one workload, and why the missing ones are missing."""

    case: Case
    timings: tuple[Timing, ...]
    missing: Mapping[str, str]


def compare(
    spec: AttentionSpec,
    batch: int,
    seqlen_q: int,
    seqlen_kv: int,
    *,
    rounds: int = 5,
    rest_s: float = 0.0,
    peers: Sequence[str] = tuple(PEERS),
    others: Mapping[str, AttentionSpec] = MappingProxyType({}),
) -> Comparison:
    """Time flashgen's kernel for a spec, and each peer that can do the same, on N(0, 1) inputs.

    `others` are further specs of the same attention by name, with other tiles.

    Raises:
        LaunchError: there is no GPU, or flashgen's own kernels cannot run on it.
    """
    require_gpu()
    case = Case.of(spec, batch, seqlen_q, seqlen_kv)
    q, k, v = random_inputs(case.work, "cuda")
    case = replace(case, samples=sample_inputs(spec, q, k))
    rows, expected = case.reference(q, k, v)
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}

    def admit(name: str, call: Callable[[], torch.Tensor]) -> None:
        output = call()
        torch.cuda.synchronize()
        errors[name] = _relative_error(output[0, rows, 0].double(), expected)
        calls[name] = call

    for name, own in {"flashgen": spec, **others}.items():
        admit(name, _flashgen(replace(case, spec=own), q, k, v))
    for name in peers:
        try:
            admit(name, PEERS[name](case, q, k, v))
        except (Unsupported, ImportError) as error:
            missing[name] = str(error).partition("\n")[0]
        except (RuntimeError, AssertionError) as error:  # how they refuse a shape
            missing[name] = f"refuses: {str(error).partition(chr(10))[0]}"
    times, in_graph = interleave(calls, rounds, rest_s)
    timings = [
        Timing(name, times[name], case.work.flops / times[name] / 1e9, errors[name], in_graph[name])
        for name in calls
    ]
    return Comparison(case, tuple(timings), missing)


def matmul_tflops() -> float:
    """The bf16 rate of torch's matrix product on this GPU now: the better of 4096^3 and 8192^3.

    Raises LaunchError where there is no GPU.
    """
    require_gpu()
    best = 0.0
    for n in (4096, 8192):
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            return a @ b

        for _ in range(3):
            product()
        best = max(best, 2 * n**3 / _time(product, 10) / 1e9)
    return best


def require_gpu() -> None:
    """Raises LaunchError, with what to do, where torch sees no NVIDIA GPU."""
    if not torch.cuda.is_available():
        raise LaunchError(
            "a benchmark needs an NVIDIA GPU, and torch sees none here",
            hint="`flashgen run` checks a kernel's plan on a CPU; `flashgen doctor` says what is missing",
        )


def _flashgen(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What the mask needs is prepared beforehand, as FlexAttention's block mask is."""
    from flashgen.runtime import load

    kernel, given = load(case.spec), case.samples.arguments
    prepared = kernel.prepare(q, k, v, **given) if kernel.plan.preparation else None

    def call() -> torch.Tensor:
        output = kernel(q, k, v, prepared=prepared, **given)
        assert isinstance(output, torch.Tensor)
        return output

    return call


def _relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    norm, error = float(expected.norm()), float((output - expected).norm())
    return error / norm if norm else error


def balanced_orders(count: int) -> list[list[int]]:
    """Orders of 0..count-1 in which each number comes first equally often, and after each other one.

    E. J. Williams, "Experimental designs balanced for the estimation of residual effects of treatments"
    (1949): `count` orders where it is even, twice as many where it is odd.
    """
    first = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(count)]
    orders = [[(place + start) % count for place in first] for start in range(count)]
    return orders if count % 2 == 0 else [*orders, *(order[::-1] for order in orders)]


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, rest_s: float = 0.0
) -> tuple[dict[str, float], dict[str, bool]]:
    """Median milliseconds of each call over the rounds, and whether it was captured in a graph.

    Before each sample the chip rests for `rest_s` seconds. Published numbers are often those of a rested
    chip: FlashAttention's benchmarks sleep for a second before each, and take 30 calls.
    """
    graphs: list[object] = []
    replays: dict[str, Callable[[], object]] = {}
    in_graph: dict[str, bool] = {}
    for name, call in calls.items():
        replays[name], in_graph[name] = _capture(call, graphs)
    repeats = {}
    for name, replay in replays.items():
        for _ in range(3):
            replay()
        repeats[name] = max(3, min(1000, math.ceil(SAMPLE_MS / max(_time(replay, 3), 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in replays}
    names, orders = list(replays), balanced_orders(len(replays))
    for order in islice(cycle(orders), rounds):
        for name in (names[place] for place in order):
            time.sleep(rest_s)
            samples[name].append(_time(replays[name], repeats[name]))
    return {name: statistics.median(times) for name, times in samples.items()}, in_graph


def _capture(call: Callable[[], object], graphs: list[object]) -> tuple[Callable[[], object], bool]:
    """`call` as the replay of a CUDA graph, or itself where it cannot be captured."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation must not fall into the capture
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, False
    graphs.append((graph, output))  # the graph writes into the output's memory for as long as it lives
    return graph.replay, True


def _time(call: Callable[[], object], repeats: int) -> float:
    """Mean milliseconds of one call over back-to-back calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / repeats
