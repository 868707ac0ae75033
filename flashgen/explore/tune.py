"""Measuring what the model only predicts: the search behind `flashgen tune`.

The proposals of the ranking are built, checked and timed; then the neighbours of the best, twice; and the
finalists once more, with the model's own choice among them, for longer.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

from flashgen._version import __version__
from flashgen.arch import Arch, arch
from flashgen.errors import LaunchError
from flashgen.explore.builds import build_all
from flashgen.explore.proposals import proposals, tiling_of, variants
from flashgen.explore.ranking import rank_correlation, regret
from flashgen.explore.trials import Trial, check, measure
from flashgen.plan import Candidate, KernelPlan, Workload
from flashgen.plan.tuned import Key, Tuned, key_of
from flashgen.runtime.devices import target_of
from flashgen.spec import AttentionSpec

# Shares of the budget: the proposals, two generations of neighbours, the finalists.
SHARES = (0.35, 0.2, 0.2, 0.25)
PARENTS = 2  # of each generation's best, whose neighbours are tried
KEPT = 3  # best ones that are timed again beside their neighbours
FINALISTS = 4

Report = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


@dataclass
class Outcome:
    """One tiling: what was predicted, what was measured, or why it was not."""

    candidate: Candidate
    ms: float | None = None
    failure: str | None = None

    @property
    def plan(self) -> KernelPlan:
        """The plan that was tried."""
        return self.candidate.plan


@dataclass(frozen=True)
class Tuning:
    """What came out for one spec and workload; outcomes with the fastest first, failures last."""

    spec: AttentionSpec
    work: Workload
    outcomes: tuple[Outcome, ...]
    tuned: Tuned
    seconds: float

    def tflops(self, outcome: Outcome) -> float | None:
        """Measured TFLOP/s over the kept pairs."""
        return None if outcome.ms is None else self.work.flops / outcome.ms / 1e9


@dataclass
class _Search:
    """The state of one search: every tiling tried so far."""

    spec: AttentionSpec
    work: Workload
    arch: Arch
    report: Report
    tried: dict[tuple[object, ...], Outcome] = field(default_factory=dict)
    loaded: dict[tuple[object, ...], Trial] = field(default_factory=dict)

    def admit(self, candidates: Iterable[Candidate]) -> list[Outcome]:
        """Build and check those not tried before; the ones that may be timed."""
        fresh = {
            tiling_of(candidate.plan): Outcome(candidate)
            for candidate in candidates
            if tiling_of(candidate.plan) not in self.tried
        }
        self.tried |= fresh
        outcomes = list(fresh.values())
        built = 0

        def done() -> None:
            nonlocal built
            built += 1
            self.report("building", built, len(outcomes))

        failures = build_all([outcome.plan for outcome in outcomes], done)
        for number, (outcome, failure) in enumerate(zip(outcomes, failures, strict=True), 1):
            outcome.failure = failure
            if failure is None:
                trial = Trial.of(self.spec, outcome.plan)
                outcome.failure = check(trial, self.spec)
                self.loaded[tiling_of(outcome.plan)] = trial
            self.report("checking", number, len(outcomes))
        return [outcome for outcome in outcomes if outcome.failure is None]

    def time(self, outcomes: list[Outcome], seconds: float) -> None:
        """Time outcomes against one another."""
        rounds = 0

        def done() -> None:
            nonlocal rounds
            rounds += 1
            self.report(f"measuring {len(outcomes)}", rounds, 0)

        trials = [self.loaded[tiling_of(outcome.plan)] for outcome in outcomes]
        for outcome, ms in zip(outcomes, measure(trials, self.work, seconds, done), strict=True):
            outcome.ms = ms

    def best(self, count: int) -> list[Outcome]:
        """The fastest so far."""
        return sorted((o for o in self.tried.values() if o.ms is not None), key=_ms)[:count]


def tune(
    spec: AttentionSpec, *, budget: float, top: int, report: Report = lambda what, done, of: None
) -> Tuning:
    """Find the fastest tiling for a spec's workload on this GPU in about `budget` seconds of timing.

    Raises:
        LaunchError: there is no GPU, the spec is for another one, its sequences are too short to speak for
            others, or no proposal works.
        Hang: a kernel does not finish; the process must end.
    """
    target = require_target(spec)
    work = Workload.of(spec)
    key = key_of(work)
    if key is None:
        raise LaunchError(
            f"{spec.name}: sequences of {min(work.seqlen_q, work.seqlen_kv)} are too short to tune for",
            hint="an entry speaks for 256 and longer (--seqlen sets it); shorter ones are solved for",
        )
    started = time.monotonic()
    search = _Search(spec, work, arch(target), report)
    first = search.admit(proposals(spec, search.arch, top))
    if not first:
        why = "; ".join(sorted({o.failure for o in search.tried.values() if o.failure}))
        raise LaunchError(f"{spec.name}: no tiling works: {why}")
    search.time(first, SHARES[0] * budget)
    predicted = [1 / outcome.candidate.cost.seconds for outcome in first]
    measured = [1 / _ms(outcome) for outcome in first]
    for share in SHARES[1:-1]:
        parents = search.best(PARENTS)
        fresh = search.admit(v for parent in parents for v in variants(parent.plan, spec, search.arch))
        if not fresh:
            break
        search.time([*search.best(KEPT), *fresh], share * budget)
    choice = first[predicted.index(max(predicted))]
    finalists = [*(o for o in search.best(FINALISTS) if o is not choice), choice]
    search.time(finalists, SHARES[-1] * budget)
    winner = min(finalists, key=_ms)
    entry = _entry(key, winner, search, rank_correlation(predicted, measured), choice)
    outcomes = sorted(search.tried.values(), key=lambda o: (o.ms is None, o.ms or 0.0))
    return Tuning(spec, work, tuple(outcomes), entry, time.monotonic() - started)


def require_target(spec: AttentionSpec) -> str:
    """The target of this machine's GPU. Raises LaunchError where there is none, or the spec names another."""
    if not torch.cuda.is_available():
        raise LaunchError(
            "tuning measures, which needs an NVIDIA GPU, and torch sees none here",
            hint="`flashgen plan --all` ranks tilings without one; `flashgen doctor` says what is missing",
        )
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    if spec.target not in ("auto", target):
        raise LaunchError(
            f"{spec.name} is for {spec.target}, and this GPU is {target}",
            location=spec.locate("target"),
            hint="write 'target: auto', or tune on such a GPU",
        )
    return target


def _entry(key: Key, winner: Outcome, search: _Search, correlation: float | None, choice: Outcome) -> Tuned:
    plan = winner.plan
    lost = regret([1.0, 0.0], [1 / _ms(choice), 1 / _ms(winner)])
    return Tuned.model_validate(
        {
            **key._asdict(), "family": plan.family,
            "tile_q": plan.tile_q, "tile_kv": plan.tile_kv, "stages": plan.stages, "warps": plan.warps,
            "schedule": asdict(plan.schedule), "tflops": round(search.work.flops / _ms(winner) / 1e9, 1),
            "tried": sum(outcome.ms is not None for outcome in search.tried.values()),
            "rank_correlation": None if correlation is None else round(correlation, 2),
            "regret": round(lost, 3), "source": _source(),
        }
    )  # fmt: skip


def _ms(outcome: Outcome) -> float:
    assert outcome.ms is not None
    return outcome.ms


def _source() -> str:
    """Command, version, the commit where there is one, and the day."""
    root = Path(__file__).resolve().parent.parent.parent
    commit = ""
    if (root / ".git").exists():
        try:
            asked = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
            commit = f" ({subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()})"
        except (OSError, subprocess.CalledProcessError):
            commit = ""
    return f"flashgen tune {__version__}{commit}, {date.today().isoformat()}"


__all__ = ["Outcome", "Report", "Tuning", "require_target", "tune"]
