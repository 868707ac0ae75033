"""`flashgen run` works for every spec of the gallery: what masks and scores read is made up."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from flashgen.cli import main
from flashgen.cli.arguments import gallery
from flashgen.explore.inputs import random_inputs, sample_inputs
from flashgen.plan import Workload
from flashgen.spec import parse_spec

SPEC = """
flashgen: 1
name: tiny
attention:
  heads: {q: 4, kv: 2}
  head_dim: 32
  mask: kv <= q and parts[q] <= parts[kv] + near and some[head, kv]
  score: score * gain[head] + cap
  params: {near: {runtime: int, min: 300}, cap: runtime}
  tensors:
    parts: {index: [batch, kv], dtype: int32, sorted: true}
    some: {index: [batch, head, kv], dtype: bool}
    gain: {index: [head], dtype: fp16}
  sink: true
workload: {batch: 2, seqlen: 64}
"""


@pytest.mark.parametrize("name", gallery())
def test_every_spec_runs(name: str) -> None:
    arguments = ["run", name, "--device", "cpu", "--seqlen", "72", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"]


def test_samples_are_what_the_spec_declares() -> None:
    spec = parse_spec(SPEC)
    q, k, _ = random_inputs(Workload.of(spec), "cpu")
    samples, again = (sample_inputs(spec, q, k) for _ in range(2))
    shapes = {name: tuple(tensor.shape) for name, tensor in samples.tensors.items()}
    assert shapes == {"parts": (2, 64), "some": (2, 4, 64), "gain": (4,)}
    assert (samples.tensors["parts"].diff() >= 0).all() and samples.tensors["parts"].unique().numel() > 1
    assert samples.tensors["some"].any() and not samples.tensors["some"].all()
    assert samples.params["near"] == 300 and samples.params["cap"] > 0
    assert samples.sink is not None and samples.sink.shape == (4,)
    assert all(tensor.equal(again.tensors[name]) for name, tensor in samples.tensors.items())
