"""`flashgen tune` without a GPU: what is tried, how the winner is chosen and kept, what a hang does.

Building, checking and timing are stood in for; tests/gpu/test_tuning.py runs them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click.testing
import pytest

torch = pytest.importorskip("torch")

from flashgen import cli  # noqa: E402
from flashgen.arch import ARCHS  # noqa: E402
from flashgen.errors import LaunchError  # noqa: E402
from flashgen.explore import builds, trials, tune  # noqa: E402
from flashgen.explore.proposals import proposals, tiling_of, variants  # noqa: E402
from flashgen.plan import KernelPlan, Sm90Schedule, Workload, rank, solve  # noqa: E402
from flashgen.plan.constraints import violations  # noqa: E402
from flashgen.plan.tiling import Tiling  # noqa: E402
from flashgen.plan.tuned import TuningWarning, read, user_path  # noqa: E402
from flashgen.spec import AttentionSpec  # noqa: E402

H200 = ARCHS["sm_90a"]


def make_spec(seqlen: int = 2048, mask: Any = "causal", **rest: Any) -> AttentionSpec:
    parts: dict[str, Any] = {
        "attention": {"heads": 16, "head_dim": 128, "mask": mask},
        "workload": {"batch": 8, "seqlen": seqlen},
    }
    return AttentionSpec(name="mine", **(parts | rest))


# -- proposals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_90a", "sm_80"])
def test_proposals_begin_with_the_models_choice_and_differ(target: str) -> None:
    spec, chip = make_spec(), ARCHS[target]
    found = proposals(spec, chip, 12)
    assert len(found) == 12
    assert found[0] == rank(spec, chip, tunings=()).candidates[0]
    assert len({tiling_of(c.plan) for c in found}) == 12
    tiles = [(c.plan.tile_q, c.plan.tile_kv) for c in found]
    assert max(tiles.count(tile) for tile in tiles) <= 2 and len(set(tiles)) >= 6
    assert len(proposals(spec, chip, 1)) == 1


def test_what_is_tuned_already_is_proposed_again() -> None:
    spec = make_spec()
    ranking = rank(spec, H200)
    assert ranking.tuned is not None
    assert tiling_of(ranking.tuned.plan) in [tiling_of(c.plan) for c in proposals(spec, H200, 4)]


@pytest.mark.parametrize("mask", ["full", "causal", {"window": 512}])
def test_variants_are_legal_and_near(mask: Any) -> None:
    spec = make_spec(mask=mask)
    plan = rank(spec, H200, tunings=()).best
    found = [candidate.plan for candidate in variants(plan, spec, H200)]
    assert len({tiling_of(p) for p in found} | {tiling_of(plan)}) == len(found) + 1
    head = Workload.of(spec).head
    for near in found:
        tiling = Tiling(near.family, near.tile_q, near.tile_kv, near.stages, near.warps, near.schedule)
        assert violations(tiling, head, H200) == ()
        assert (near.tile_q, near.warps) == (plan.tile_q, plan.warps)
    changed = {
        name
        for near in found
        for name in ("output_wait", "rescale", "key_order", "tile_order", "q_stages", "ping_pong")
        if getattr(near.schedule, name) != getattr(plan.schedule, name)
    }
    assert {"output_wait", "rescale", "tile_order", "ping_pong"} <= changed
    times = {(p.schedule.output_wait, p.schedule.rescale) for p in (plan, *found)}  # type: ignore[union-attr]
    assert {("middle", "early"), ("middle", "late")} <= times
    assert ("key_order" in changed) == (mask != "full")


def test_variants_of_the_ampere_family() -> None:
    spec = make_spec()
    plan = solve(spec, ARCHS["sm_80"])
    assert {(p.plan.tile_kv, p.plan.stages) for p in variants(plan, spec, ARCHS["sm_80"])}


@pytest.mark.compiler
def test_plans_are_built_in_parallel_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    best = rank(make_spec(), H200, tunings=()).candidates
    fits = next(c.plan for c in best if isinstance(c.plan.schedule, Sm90Schedule))
    wrong = KernelPlan(**{**vars(fits), "smem_bytes": fits.smem_bytes - 1024})
    ready: list[int] = []
    failures = builds.build_all([fits, wrong], lambda: ready.append(1))
    assert failures[0] is None and "static assertion" in (failures[1] or "")
    assert len(ready) == 2
    assert builds.build_all([], lambda: None) == []


# -- the search --------------------------------------------------------------------------------------------


class Bench:
    """Stands in for a GPU: a time for each plan, and a record of what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ms: Callable[[KernelPlan], float]) -> None:
        self.ms = ms
        self.built: list[KernelPlan] = []
        self.timed: list[list[KernelPlan]] = []
        self.seconds: list[float] = []
        self.spill: Callable[[KernelPlan], bool] = lambda plan: False
        self.wrong: Callable[[KernelPlan], bool] = lambda plan: False
        monkeypatch.setattr(tune, "require_target", lambda spec: "sm_90a")
        monkeypatch.setattr(tune, "build_all", self._build)
        monkeypatch.setattr(tune, "Trial", self)
        monkeypatch.setattr(tune, "check", lambda plan, spec: "error 1" if self.wrong(plan) else None)
        monkeypatch.setattr(tune, "measure", self._measure)

    def of(self, spec: AttentionSpec, plan: KernelPlan) -> KernelPlan:
        return plan

    def _build(self, plans: Sequence[KernelPlan], done: Callable[[], None]) -> list[str | None]:
        self.built.extend(plans)
        for _ in plans:
            done()
        return ["spills" if self.spill(plan) else None for plan in plans]

    def _measure(
        self, plans: Sequence[KernelPlan], work: Workload, seconds: float, done: Callable[[], None]
    ) -> list[float]:
        self.timed.append(list(plans))
        self.seconds.append(seconds)
        done()
        return [self.ms(plan) for plan in plans]


def wants(plan: KernelPlan) -> float:
    """Fastest where tile_kv is 80, O is rescaled late and the keys ascend."""
    schedule = plan.schedule
    assert isinstance(schedule, Sm90Schedule)
    ms = 1.0 + abs(plan.tile_kv - 80) / 100 + abs(plan.tile_q - 128) / 1000
    return ms - 0.1 * (schedule.rescale == "late") - 0.05 * (schedule.key_order == "ascending")


def test_the_search_goes_beyond_the_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, wants)
    told: list[str] = []
    found = tune.tune(make_spec(), budget=10.0, top=8, report=lambda what, done, of: told.append(what))
    best = found.tuned
    assert best.schedule["rescale"] == "late" and best.schedule["key_order"] == "ascending"
    assert len({tiling_of(plan) for plan in bench.built}) == len(bench.built)  # nothing is built twice
    assert best.tried == len(bench.built) == len(found.outcomes)
    assert sum(bench.seconds) == pytest.approx(10.0)
    assert len(bench.timed) == 4
    choice = rank(make_spec(), H200, tunings=()).best
    assert tiling_of(choice) in [tiling_of(plan) for plan in bench.timed[-1]]
    assert best.regret == pytest.approx(1 - wants(found.outcomes[0].plan) / wants(choice), abs=1e-3)
    assert best.rank_correlation is not None and -1 <= best.rank_correlation <= 1
    assert (best.mask, best.seqlen_q, best.seqlen_kv) == ("causal", 2048, 2048)
    assert best.tflops == pytest.approx(found.tflops(found.outcomes[0]), rel=1e-3)
    assert {"building", "checking"} <= set(told) and any(what.startswith("measuring") for what in told)
    times = [outcome.ms for outcome in found.outcomes]
    assert times == sorted(times, key=lambda ms: ms or 0)


def test_what_spills_or_is_wrong_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, wants)
    bench.spill = lambda plan: plan.tile_kv == 96
    bench.wrong = lambda plan: plan.schedule.rescale == "late"  # type: ignore[union-attr]
    found = tune.tune(make_spec(), budget=1.0, top=8)
    timed = [plan for plans in bench.timed for plan in plans]
    assert timed and not any(bench.spill(plan) or bench.wrong(plan) for plan in timed)
    assert found.tuned.tile_kv != 96 and found.tuned.schedule["rescale"] == "early"
    assert {o.failure for o in found.outcomes if o.ms is None} <= {"spills", "error 1"}
    assert found.outcomes[0].ms is not None and found.outcomes[-1].failure


def test_nothing_that_works_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, wants).spill = lambda plan: True
    with pytest.raises(LaunchError, match="no tiling works: spills"):
        tune.tune(make_spec(), budget=1.0, top=4)


def test_short_sequences_are_not_tuned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, wants)
    with pytest.raises(LaunchError, match="sequences of 100 are too short"):
        tune.tune(make_spec(100), budget=1.0, top=4)


# -- the watchdog ------------------------------------------------------------------------------------------


def test_a_kernel_that_does_not_finish_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def record(self) -> None: ...

        def query(self) -> bool:
            return False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(trials, "WATCHDOG_S", 0.01)
    plan = solve(make_spec(), H200)
    with pytest.raises(trials.Hang, match=rf"tile_kv={plan.tile_kv}, .* does not finish: a test"):
        trials.finish(plan, "a test")


# -- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    return Bench(monkeypatch, wants)


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli.main, ["tune", "--budget", "1", "--top", "4", *arguments])


def test_the_winner_is_what_solve_gives_from_then_on(bench: Bench) -> None:
    result = run("llama3-8b")
    assert result.exit_code == 0, result.output
    path = user_path("sm_90a")
    assert f"written to {path}" in result.output and "TFLOP/s, the best of" in result.output
    file = read(path)
    assert file is not None and file.gpu == "NVIDIA H200"
    (entry,) = file.entries
    assert (entry.head_dim_qk, entry.mask, entry.seqlen_q) == (128, "causal", 4096)
    plan = solve(make_spec(4096), H200)
    assert plan.why.origin == "tuned" and plan.schedule == entry.tiling.schedule
    assert dict(plan.why.measured)["source"] == entry.source


def test_several_lengths_go_to_a_file_that_keeps_the_others(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "sm_90a.json"
    lengths = ["--seqlen", "512", "--seqlen", "1024", "--out", str(out)]
    result = run("llama3-8b", *lengths, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert answer["file"] == str(out) and [r["seqlen"]["q"] for r in answer["results"]] == [512, 1024]
    assert answer["results"][0]["batch"] == 64
    assert answer["results"][0]["tried"][0]["tflops"] > 0
    assert run("gemma2-9b", "--out", str(out)).exit_code == 0
    file = read(out)
    assert file is not None
    assert [(e.head_dim_qk, e.seqlen_q) for e in file.entries] == [(128, 512), (128, 1024), (256, 8192)]
    assert not user_path("sm_90a").exists()


def test_a_file_that_is_no_tunings_is_not_overwritten(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "notes.json"
    out.write_text('{"mine": 1}')
    result = run("llama3-8b", "--out", str(out))
    assert result.exit_code == 2 and "holds no tunings" in result.output
    assert out.read_text() == '{"mine": 1}'
    out.write_text('{"target": "sm_80", "gpu": "A100", "entries": []}')
    result = run("llama3-8b", "--out", str(out))
    assert result.exit_code == 2 and "holds tunings for sm_80" in result.output


@pytest.mark.parametrize("budget", ["-1", "nan", "inf", "soon"])
def test_a_budget_is_a_number_of_seconds(bench: Bench, budget: str) -> None:
    result = run("llama3-8b", "--budget", budget)
    assert result.exit_code == 2 and "--budget" in result.output and not bench.built


def test_where_nothing_can_be_written_nothing_is_measured(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (("file", "cannot be read"), ("link", "cannot be written")):
        monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / name))
        for place in ([], ["--out", str(tmp_path / name / "sm_90a.json")]):
            result = run("llama3-8b", *place)
            assert result.exit_code == 2 and message in result.output
            assert str(tmp_path / name) in result.output and not bench.built


def test_what_was_measured_stays_when_a_later_spec_fails(bench: Bench) -> None:
    result = run("llama3-8b", "--seqlen", "1024", "--seqlen", "100")
    assert result.exit_code == 1 and "too short" in result.output
    file = read(user_path("sm_90a"))
    assert file is not None and [e.seqlen_q for e in file.entries] == [1024]


def test_a_hang_ends_the_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        """What no handler catches, as the end of a process is not caught."""

    def leave(code: int) -> None:
        raise Ended(code)

    def hang(*_: Any) -> None:
        raise trials.Hang("attn_fwd does not finish")

    monkeypatch.setattr(tune, "measure", hang)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Ended, match="1"):
        run("llama3-8b")


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run("llama3-8b")
    assert result.exit_code == 1
    assert "tuning measures, which needs an NVIDIA GPU" in result.output


def test_a_spec_for_another_chip_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "target_of", lambda device: "sm_90a")
    assert tune.require_target(make_spec()) == "sm_90a"
    with pytest.raises(LaunchError, match="is for sm_80, and this GPU is sm_90a"):
        tune.require_target(make_spec(target="sm_80"))


def test_a_damaged_own_file_is_told_of(bench: Bench) -> None:
    path = user_path("sm_90a")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    result = run("llama3-8b")
    assert result.exit_code == 2 and "remove it" in result.output
    with pytest.warns(TuningWarning):
        solve(make_spec(), H200)
