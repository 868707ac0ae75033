"""`flashgen run` and `flashgen bench` on a GPU."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from flashgen.cli import main

pytestmark = pytest.mark.gpu


def test_run_on_the_gpu() -> None:
    result = CliRunner().invoke(main, ["run", "llama3-8b", "--device", "cuda", "--seqlen", "1000", "--json"])
    assert result.exit_code == 0, result.output
    outcome = json.loads(result.stdout)
    assert outcome["passed"]
    assert not outcome["reduced"]
    assert 0 < outcome["error"] <= outcome["tolerance"]
    assert outcome["tflops"] > 1


@pytest.mark.parametrize("spec", ["llama3-8b", "bert-large"])
def test_bench_times_what_computes_the_same(spec: str) -> None:
    arguments = ["bench", spec, "--seqlen", "512", "--rounds", "2", "--peers", "flash,efficient", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (comparison,) = json.loads(result.stdout)["results"]
    timings = {timing["name"]: timing for timing in comparison["timings"]}
    assert {"flashgen", "flash"} <= timings.keys(), comparison["missing"]
    for timing in timings.values():
        assert timing["in_graph"]
        assert timing["error"] < 1e-2
