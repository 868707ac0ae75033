"""`flashgen tune` on a GPU: proposals are built, checked and timed, and the winner is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from flashgen.arch import arch
from flashgen.cli import main
from flashgen.explore.builds import build_all
from flashgen.explore.proposals import proposals
from flashgen.explore.trials import Trial, check, measure
from flashgen.plan import Workload, solve
from flashgen.plan.tuned import read, user_path
from flashgen.runtime.devices import target_of
from flashgen.spec import AttentionSpec

pytestmark = pytest.mark.gpu


def make_spec(head_dim: int = 128, mask: Any = "causal") -> AttentionSpec:
    parts: dict[str, Any] = {
        "attention": {"heads": {"q": 8, "kv": 4}, "head_dim": head_dim, "mask": mask},
        "workload": {"batch": 4, "seqlen": 1024},
    }
    return AttentionSpec(name="mine", **parts)


@pytest.fixture
def target() -> str:
    return target_of(torch.device("cuda", 0))


@pytest.mark.parametrize("mask", ["full", "causal", {"window": 300}], ids=str)
def test_proposals_are_right_and_timed(target: str, mask: Any) -> None:
    spec = make_spec(mask=mask)
    plans = [candidate.plan for candidate in proposals(spec, arch(target), 6)]
    assert build_all(plans, lambda: None) == [None] * len(plans)
    trials = [Trial.of(spec, plan) for plan in plans]
    assert [check(trial, spec) for trial in trials] == [None] * len(plans)
    times = measure(trials, Workload.of(spec), seconds=0.5)
    assert all(1e-3 < ms < 100 for ms in times)


def test_a_wrong_kernel_is_found(target: str) -> None:
    full, causal = make_spec(mask="full"), make_spec()
    trial = Trial.of(full, solve(full, arch(target)))
    assert check(trial, full) is None
    assert "is allowed" in (check(trial, causal) or "")


def test_the_command(target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("FLASHGEN_CACHE_DIR", str(tmp_path / "cache"))
    arguments = ["tune", "llama3-8b", "--seqlen", "512", "--budget", "1", "--top", "4", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (tuning,) = json.loads(result.stdout)["results"]
    assert tuning["tuned"]["tflops"] > 1 and tuning["tuned"]["tried"] >= 4
    file = read(user_path(target))
    assert file is not None and len(file.entries) == 1
    assert file.entries[0].tflops == tuning["tuned"]["tflops"]
